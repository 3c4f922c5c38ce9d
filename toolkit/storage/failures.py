"""Which errors pass by themselves, and how the others are told."""

import errno
import os
import re
from typing import Any, NoReturn

from toolkit.errors import JobError
from toolkit.secret import Secret

LOCAL_TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EBUSY}
REMOTE_FINAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
OWN_FAULTS = (TypeError, AttributeError, NotImplementedError, AssertionError, LookupError)
NO_RIGHTS = {  # of botocore, asyncssh, azure and gcsfs, which are not imported only to name them
    "ClientAuthenticationError",
    "HostKeyNotVerifiable",
    "InvalidConfigError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "PermissionDenied",
    "ProfileNotFound",
    "SFTPPermissionDenied",
    "UnauthorizedSSOTokenError",
}
NO_RIGHTS_CODES = {"AccessDenied", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
MALFORMED = {"InvalidBucketName", "ParamValidationError"}


def shown(url: str) -> str:
    """The URL as it may be printed: without a password, a token in a query, or what the job file keeps secret."""
    if isinstance(url, Secret):
        return url.written
    scheme, separator, rest = url.rpartition("://")
    if not separator:
        return url
    login = r"^[^/\s]*@" if scheme.endswith(("http", "https")) else r"^[^/\s@]*:[^/\s]*@"  # az://container@… is a place
    return scheme + separator + re.sub(r"\?\S*=\S*", "?…", re.sub(login, "", rest))


def passes(error: Exception, local: bool) -> bool:
    """Whether an error may be gone on the next try."""
    if isinstance(error, (*ANSWERS, *OWN_FAULTS)) or _is_about_rights(error) or _is_malformed(error):
        return False
    if local:
        return isinstance(error, OSError) and error.errno in LOCAL_TRANSIENT
    status = _status(error)
    if status is not None and 400 <= status < 500:
        return status in {408, 409, 425, 429}
    return not (isinstance(error, OSError) and error.errno in REMOTE_FINAL)


def _is_about_rights(error: BaseException) -> bool:
    if {type(error).__name__, error_code(error)} & (NO_RIGHTS | NO_RIGHTS_CODES):
        return True
    return isinstance(error, PermissionError) or _status(error) in {401, 403}


def _is_malformed(error: BaseException) -> bool:
    too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    return too_long or isinstance(error, ValueError) or bool({type(error).__name__, error_code(error)} & MALFORMED)


def _response(error: BaseException | None) -> dict[str, Any]:
    """What botocore keeps of an answer, wherever in the chain of causes."""
    while error is not None:
        if isinstance(found := getattr(error, "response", None), dict):
            return found
        error = error.__cause__
    return {}


def error_code(error: BaseException) -> str:
    """What S3 calls the error, or nothing."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error of botocore, aiohttp, gcsfs or azure."""
    found = [_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")]
    found += [getattr(error, name, None) for name in ("status", "status_code", "code")]
    return next((status for status in found if isinstance(status, int) and 100 <= status < 600), None)


def tell(error: Exception, verb: str, url: str, local: bool) -> NoReturn:
    """Raise what does not pass as what it is, with the name of the file."""
    name, cause = shown(url), _printable(error)
    if isinstance(error, (JobError, *OWN_FAULTS)):
        raise error
    for kind, number in zip(ANSWERS, (errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR), strict=True):
        if isinstance(error, kind):
            raise kind(number, os.strerror(number), name) from cause
    if _is_malformed(error):
        raise JobError(f"{name} is not a URL that can be used: {_words(error)}") from cause
    if isinstance(error, OSError) and error.errno and local:
        raise OSError(error.errno, error.strerror, name) from cause
    if _is_about_rights(error):
        raise PermissionError(f"cannot {verb} {name}: {_words(error)}; check the credentials") from cause
    raise _like(error, f"cannot {verb} {name}: {_words(error)}") from cause


def given_up(error: Exception | None, verb: str, url: str, tried: str) -> OSError:
    """What to raise when time is over."""
    words = _words(error) if error else "no time was left"
    raised = _like(error or TimeoutError(), f"cannot {verb} {shown(url)}: {words}; {tried}")
    raised.__cause__ = _printable(error)
    return raised


def _words(error: BaseException) -> str:
    """What an error says, without secrets."""
    silent = "no answer" if isinstance(error, TimeoutError) else type(error).__name__
    return re.sub(r"\w+://[^\s'\"]+", lambda match: shown(match[0]), str(error)) or silent


def _printable(error: Exception | None) -> Exception | None:
    """An error that may stand in a traceback; not one that says a secret."""
    return error if error and str(error) in {"", _words(error)} else None


def _like(error: BaseException, text: str) -> OSError:
    like = TimeoutError(text) if isinstance(error, TimeoutError) else OSError(text)
    if isinstance(error, OSError):
        like.errno = error.errno
    return like

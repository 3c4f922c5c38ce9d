"""A text that came from the environment. Errors and files show where it came from, never what it says."""


class Secret(str):
    """Acts as its text; `repr`, which messages use, is what the job file says instead, such as '${env:TOKEN}'."""

    written: str

    def __new__(cls, text: str, written: str) -> "Secret":
        secret = super().__new__(cls, text)
        secret.written = written
        return secret

    def __repr__(self) -> str:
        return repr(self.written)

    def __reduce__(self) -> tuple[type["Secret"], tuple[str, str]]:
        return Secret, (str(self), self.written)

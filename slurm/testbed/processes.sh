# shellcheck shell=bash
# Daemons by their pid files.

content() { [ ! -s "$1" ] || tr -dc 0-9 <"$1"; }

# Whether the process of a pid file runs under that name. A dead daemon can stay a zombie, where PID 1 reaps late, and its
# number can be another's by now: kill -0 would prove nothing.
running() { # name, pid file
    local pid
    pid=$(content "$2")
    [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ] && ! grep -qs '^State:.Z' "/proc/$pid/status"
}

stopped() { ! running "$@"; }

stop() { # name, pid file
    stopped "$@" || kill "$(content "$2")" || true # it may have ended just now
    wait_for 30 "$1 to end" stopped "$@" || kill -9 "$(content "$2")"
    rm -f "$2"
}

wait_for() { # seconds, what for, command...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || {
            grep -hs fatal "$BASE"/log/slurm*.log | tail -1 >&2
            say "timed out: waited for $what; see $BASE/log"
            return 1
        }
        sleep 0.1
    done
}

# Starts a daemon with nothing of the caller's: no environment, no folder, no terminal, no pipe that a caller waits on.
# Whoever calls waits for the daemon to answer.
daemon() { # command...
    (cd / && exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 setsid --fork "$@" </dev/null >>"$BASE/log/start.log" 2>&1)
}

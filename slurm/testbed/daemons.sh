# shellcheck shell=bash
# The controller's side: munge, MariaDB, slurmdbd, slurmctld. Each function leaves its daemon running and answering.

DATABASE_PORT=13306 # below 32768, where the ports begin that any client may be holding

start_munge() {
    running munged /run/munge/munged.pid && return
    install -d -o munge -g munge -m 755 /run/munge
    install -d -o munge -g munge -m 700 /etc/munge /var/lib/munge /var/log/munge
    [ -s /etc/munge/munge.key ] || {
        (umask 077 && head -c 128 /dev/urandom >/etc/munge/munge.key)
        chown munge:munge /etc/munge/munge.key
    }
    daemon setpriv --reuid=munge --regid=munge --init-groups /usr/sbin/munged
    touch "$BASE/pid/munge_is_ours"
    wait_for 10 munge munge -n -o /dev/null
}

stop_munge() {
    [ -e "$BASE/pid/munge_is_ours" ] || return 0
    stop munged /run/munge/munged.pid
    rm -f "$BASE/pid/munge_is_ours"
}

sql() { mariadb --no-defaults --socket="$BASE/mysql/mysql.sock" -u root -e "$1"; }

start_mariadb() {
    if ! running mariadbd "$BASE/mysql/mariadb.pid"; then
        if [ ! -d "$BASE/mysql/mysql" ]; then
            install -d -o mysql -g mysql -m 700 "$BASE/mysql"
            mariadb-install-db --no-defaults --user=mysql --datadir="$BASE/mysql" --auth-root-authentication-method=socket \
                --skip-test-db >"$BASE/log/mariadb-install.log" 2>&1
        fi
        daemon mariadbd --no-defaults --user=mysql --datadir="$BASE/mysql" --socket="$BASE/mysql/mysql.sock" \
            --pid-file="$BASE/mysql/mariadb.pid" --bind-address=127.0.0.1 --port=$DATABASE_PORT --skip-name-resolve \
            --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 \
            --skip-log-bin --performance-schema=OFF
    fi
    wait_for 60 mariadb sql 'select 1'
    sql "create database if not exists slurm_acct_db;
         create user if not exists slurm@'127.0.0.1' identified by 'testbed-only';
         grant all on slurm_acct_db.* to slurm@'127.0.0.1';"
}

start_slurmdbd() {
    running slurmdbd "$BASE/pid/slurmdbd.pid" || daemon slurmdbd
    wait_for 60 slurmdbd sacctmgr -n show cluster
    # before slurmctld starts, or it will not find itself in the accounting
    [ -n "$(sacctmgr -n show cluster testbed format=cluster)" ] || sacctmgr -i add cluster testbed >/dev/null
}

controller_answers() { scontrol ping | grep -q 'is UP'; }

start_slurmctld() {
    running slurmctld "$BASE/pid/slurmctld.pid" || daemon slurmctld
    wait_for 30 slurmctld controller_answers
}

scancel_all() {
    running slurmctld "$BASE/pid/slurmctld.pid" || return 0
    squeue -h -o %A | sort -u | xargs -r scancel --quiet || true # one may end meanwhile
}

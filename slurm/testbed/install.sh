# shellcheck shell=bash
# What `up` puts on the machine: packages, folders and configuration; and what `down` takes away.

# A machine that has been started again has none of the old processes, and jobs that nobody waits for: begin anew.
forget_other_boots() {
    local boot
    boot=$(</proc/sys/kernel/random/boot_id)
    [ "$(cat "$BASE/boot_id" 2>/dev/null)" = "$boot" ] || rm -rf "${BASE:?}"/{pid,state,mysql,spool}
    install -d -m 755 "$BASE"
    echo "$boot" >"$BASE/boot_id"
}

make_folders() {
    install -d -m 755 "$BASE"/{log,pid,spool,dev,state}
    for i in $(seq "$NODES"); do install -d -m 755 "$BASE/spool/n$i"; done
}

install_packages() {
    local need=() package ours=0
    for package in slurm-wlm slurmdbd munge mariadb-server iproute2 tini; do
        dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || need+=("$package")
    done
    [ ${#need[@]} != 0 ] || return 0
    say "installing ${need[*]}"
    # so that apt starts no daemons; they would be another cluster's
    [ -e /usr/sbin/policy-rc.d ] || {
        ours=1
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod 755 /usr/sbin/policy-rc.d
    }
    local done=0
    {
        apt-get update -q
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${need[@]}"
    } >"$BASE/log/apt.log" 2>&1 || done=$?
    [ $ours = 0 ] || rm /usr/sbin/policy-rc.d
    [ $done = 0 ] || {
        tail -20 "$BASE/log/apt.log" >&2
        say "apt-get could not install ${need[*]}"
        exit 1
    }
    printf '%s\n' "${need[@]}" >>"$BASE/installed"
    [ ! -d /run/systemd/system ] || systemctl --quiet disable slurmctld slurmd slurmdbd mariadb || true
}

fill() { # a template on stdin; @NAME@ is the value of NAME
    local names=(OURS BASE NET NODES GPUS DATABASE_PORT) name script=""
    for name in "${names[@]}" "$@"; do script+="s|@$name@|${!name}|g;"; done
    sed "$script"
}

write_configs() {
    local HOST STORAGE=slurmdbd TRES=gres/gpu PROCTRACK=linuxproc TASK=none GATHER=linux CONSTRAIN=no
    local LAST=$((10 + NODES)) LAST_GPU=$((GPUS - 1)) file
    HOST=$(hostname -s)
    [ "${CGROUP:-0}" = 0 ] || PROCTRACK=cgroup TASK=cgroup GATHER=cgroup CONSTRAIN=yes
    [ "${ACCOUNTING:-1}" = 1 ] || STORAGE=none TRES=cpu GATHER=none # GPUs are counted by slurmdbd or not at all
    chown slurm:slurm "$BASE"/{log,pid,state}
    install -d -m 755 "$CONF" "$BASE/conf"
    for file in slurm.conf slurmdbd.conf gres.conf cgroup.conf; do
        fill HOST STORAGE TRES PROCTRACK TASK GATHER CONSTRAIN LAST LAST_GPU <"$HERE/$file.in" >"$BASE/conf/$file"
    done
    if running slurmctld "$BASE/pid/slurmctld.pid" && ! cmp -s "$BASE/conf/slurm.conf" "$CONF/slurm.conf"; then
        refuse "the cluster is up with other settings (ACCOUNTING, CGROUP, or another version of the testbed); cluster down first"
    fi
    install -m 644 "$BASE"/conf/{slurm,gres,cgroup}.conf "$CONF"
    install -m 600 -o slurm -g slurm "$BASE/conf/slurmdbd.conf" "$CONF" # slurmdbd insists
    for i in $(seq 0 $LAST_GPU); do [ -c "$BASE/dev/fakegpu$i" ] || mknod -m 666 "$BASE/dev/fakegpu$i" c 1 3; done
    {
        echo "127.0.0.1 localhost"
        echo "$NET.1 $HOST"
        for i in $(seq "$NODES"); do echo "$NET.$((10 + i)) n$i"; done
    } >"$BASE/hosts"
}

remove_configs() {
    local file
    for file in "$CONF"/{slurm,slurmdbd,gres,cgroup}.conf; do
        [ ! -e "$file" ] || ! head -1 "$file" | grep -qxF "$OURS" || rm "$file"
    done
}

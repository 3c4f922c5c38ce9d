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

declare -A UNITS=([slurm-wlm]="slurmctld slurmd" [slurmdbd]=slurmdbd [munge]="" [mariadb-server]=mariadb [iproute2]="" [tini]="")

install_packages() {
    local need=() package units=() done=0
    release_daemons # an `up` that was killed may hold them
    for package in "${!UNITS[@]}"; do
        dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed && continue
        need+=("$package")
        read -ra units <<<"${units[*]} ${UNITS[$package]}"
    done
    [ ${#need[@]} != 0 ] || return 0
    say "installing ${need[*]}"
    hold_daemons
    {
        apt-get update -q
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${need[@]}"
    } >"$BASE/log/apt.log" 2>&1 || done=$?
    release_daemons
    [ $done = 0 ] || {
        tail -20 "$BASE/log/apt.log" >&2
        say "apt-get could not install ${need[*]}"
        exit 1
    }
    printf '%s\n' "${need[@]}" >>"$BASE/installed"
    [ ${#units[@]} = 0 ] || [ ! -d "$SYSTEMD" ] || systemctl --quiet disable "${units[@]}" || true # what was here before stays
}

# So that apt starts no daemons; they would be another cluster's.
hold_daemons() {
    trap release_daemons EXIT
    [ ! -e "$POLICY" ] || mv "$POLICY" "$POLICY.before-toolkit"
    printf '#!/bin/sh\n%s\nexit 101\n' "$OURS" >"$POLICY"
    chmod 755 "$POLICY"
}

release_daemons() {
    ! grep -qsxF "$OURS" "$POLICY" || rm "$POLICY"
    [ ! -e "$POLICY.before-toolkit" ] || mv "$POLICY.before-toolkit" "$POLICY"
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

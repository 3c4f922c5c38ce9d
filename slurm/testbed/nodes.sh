# shellcheck shell=bash
# A node: a network namespace tk-nN with a cable (tkvN) to the bridge, and below its own PID 1 everything that runs there.

network() {
    ip link show $BRIDGE >/dev/null 2>&1 && return
    ip link add $BRIDGE type bridge
    ip addr add $NET.1/24 dev $BRIDGE
    ip link set $BRIDGE up
}

node_network() {
    ip -n "tk-n$1" link show eth0 >/dev/null 2>&1 && return
    ip netns del "tk-n$1" 2>/dev/null || rm -f "/run/netns/tk-n$1" # a name that another boot has left
    ip link del "tkv$1" 2>/dev/null || true
    ip netns add "tk-n$1"
    ip link add "tkv$1" type veth peer name eth0 netns "tk-n$1"
    ip link set "tkv$1" master $BRIDGE up
    ip -n "tk-n$1" link set lo up
    ip -n "tk-n$1" addr add "$NET.$((10 + $1))/24" dev eth0
    ip -n "tk-n$1" link set eth0 up
}

node_alive() { running tini "$BASE/pid/n$1.init"; }

node_boot() {
    node_network "$1"
    if ! node_alive "$1"; then
        rm -f "$BASE/pid/n$1.init" "$BASE/pid/slurmd.n$1.pid"
        # nsenter, for `ip netns exec` would mount a /sys of its own, without cgroups
        daemon nsenter --net="/run/netns/tk-n$1" unshare --mount --uts --pid --fork --propagation private "$SELF" _init "$1"
        wait_for 10 "n$1 to boot" node_alive "$1"
    fi
    slurmd_start "$1"
}

node_init() { # PID 1 of the node
    local number
    read -r number _ </proc/self/stat # /proc is the host's still, and tells our number there
    hostname "n$1"
    mount -t proc proc /proc
    mount -t tmpfs -o mode=1777 shm /dev/shm
    mount --bind "$BASE/hosts" /etc/hosts
    echo "$number" >"$BASE/pid/n$1.init"
    exec tini -s -- sleep infinity # tini reaps orphans, which Slurm's daemons leave
}

in_node() {
    local i=$1
    shift
    nsenter -t "$(content "$BASE/pid/n$i.init")" -m -u -n -p --wdns="$PWD" -- "$@"
}

node_gone() { ! node_alive "$1"; }

node_kill() {
    node_gone "$1" || kill -9 "$(content "$BASE/pid/n$1.init")"
    wait_for 10 "n$1 to die" node_gone "$1"
    rm -f "$BASE/pid/n$1.init"
}

slurmd_alive() { # the pid in the file is the node's own number
    local pid
    pid=$(content "$BASE/pid/slurmd.n$1.pid")
    [ -n "$pid" ] && in_node "$1" sh -c "grep -qx slurmd /proc/$pid/comm && ! grep -q '^State:.Z' /proc/$pid/status" 2>/dev/null
}

slurmd_start() {
    slurmd_alive "$1" && return
    rm -f "$BASE/pid/slurmd.n$1.pid"
    daemon nsenter -t "$(content "$BASE/pid/n$1.init")" -m -u -n -p -- slurmd -N "n$1"
    wait_for 10 "slurmd of n$1" slurmd_alive "$1"
}

slurmd_kill() { in_node "$1" kill -9 "$(content "$BASE/pid/slurmd.n$1.pid")"; }

net_cut() { ip link set "tkv$1" down; }
net_join() { ip link set "tkv$1" up; }

all_nodes_usable() {
    local lost
    lost=$(sinfo -h -N -p main -t down,drain,fail -o %N | paste -sd ,)
    [ -z "$lost" ] || scontrol update "nodename=$lost" state=resume
    [ "$(sinfo -h -N -p main -t idle,alloc,mix --responding -o %N | wc -l)" = "$NODES" ]
}

remove_nodes() {
    local i
    for i in $(seq "$NODES"); do
        node_kill "$i"
        rm -f "$BASE/pid/slurmd.n$i.pid"
        ip netns del "tk-n$i" 2>/dev/null || rm -f "/run/netns/tk-n$i"
        ip link del "tkv$i" 2>/dev/null || true
        find /sys/fs/cgroup -depth -type d -path "*/slurm_n$i*" -exec rmdir {} + 2>/dev/null || true # of CGROUP=1
    done
    ip link del $BRIDGE 2>/dev/null || true
}

#!/bin/sh
# What nodes of the lab are made of, tried once in namespaces just made by unshare: a line NAME<TAB>REASON for each, without a
# reason where it works. $1 is an empty directory on the lab's disk. What fails here would fail in stage.sh or network.py.
try() {
    name=$1
    shift
    if said=$("$@" 2>&1); then said=; else said=$(printf '%s' "${said:-failed}" | tail -n 1 | tr '\t' ' '); fi
    printf '%s\t%s\n' "$name" "$said"
}
device() { mknod -m 666 "$1/null" c 1 3 && : > "$1/null"; }

cd "$1" || exit
printf 'namespaces\t\n'
mkdir tmp proc sys mqueue lower upper work merged
try mount mount -t tmpfs tmpfs tmp
try proc mount -t proc proc proc
try sysfs mount -t sysfs sysfs sys
try mqueue mount -t mqueue mqueue mqueue
try devices device tmp
try overlay mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
try fuse sh -c ': <> /dev/fuse'
if command -v ip >/dev/null && command -v tc >/dev/null; then
    try bridge ip link add name bridge type bridge
    try veth ip link add name one type veth peer name two
    try rate tc qdisc add dev one root tbf rate 1gbit burst 500kb latency 50ms
fi

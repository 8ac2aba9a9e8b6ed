#!/bin/sh
# The first process of a machine, in namespaces just made by unshare: builds the root, turns it over to the supervisor.
# In the environment: NAME, IMAGE (read-only root), HOME_DIR (the machine's own disk), PACKAGE (podferry's modules),
# SERVICES (what to supervise), CGROUPS (v2, or NAME:OPTION of every v1 hierarchy), BINDS (FROM:TO, read-only), PYTHON (an interpreter).
set -eu
R=$HOME_DIR/root

mount -t overlay overlay -o "lowerdir=$IMAGE,upperdir=$HOME_DIR/upper,workdir=$HOME_DIR/work" "$R"
mount -t proc proc "$R/proc"
mount -t sysfs sysfs "$R/sys"
mount -t tmpfs -o mode=755,size=10%,nr_inodes=800k tmpfs "$R/run"  # as Debian has it
mount -t tmpfs tmpfs "$R/tmp"

# Devices of its own: a node may make and remove entries without the machine noticing.
mount -t tmpfs -o mode=755,nosuid tmpfs "$R/dev"
mkdir "$R/dev/pts" "$R/dev/shm" "$R/dev/mqueue" "$R/dev/net"
for device in null zero full random urandom tty fuse kmsg net/tun loop-control userfaultfd; do
    [ ! -e "/dev/$device" ] || cp -a "/dev/$device" "$R/dev/$device"
done
for number in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do mknod -m 660 "$R/dev/loop$number" b 7 $number; done
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$R/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$R/dev/shm"
mount -t mqueue mqueue "$R/dev/mqueue"
ln -s pts/ptmx "$R/dev/ptmx"
ln -s /proc/self/fd "$R/dev/fd"
for stream in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${stream%:*}" "$R/dev/${stream#*:}"; done

if [ "$CGROUPS" = v2 ]; then
    mount -t cgroup2 cgroup2 "$R/sys/fs/cgroup"
else
    mount -t tmpfs -o mode=755 tmpfs "$R/sys/fs/cgroup"
    for hierarchy in $CGROUPS; do
        mkdir "$R/sys/fs/cgroup/${hierarchy%%:*}"
        mount -t cgroup -o "${hierarchy#*:}" cgroup "$R/sys/fs/cgroup/${hierarchy%%:*}"
    done
fi

# A kubelet sets these for the whole machine. It finds them set, in files that only look like the kernel's.
mkdir "$R/run/settings"
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    path=${setting%=*}
    file=$R/run/settings/$(echo "$path" | tr / _)
    echo "${setting#*=}" > "$file"
    mount --bind "$file" "$R/proc/sys/$path"
done

for bind in containerd:/var/lib/containerd containers:/var/lib/containers podferry:/var/lib/podferry kubelet:/var/lib/kubelet log:/var/log \
    etc:/etc/podferry brick:/srv/brick registry:/srv/registry; do
    mkdir -p "$HOME_DIR/${bind%%:*}" "$R${bind#*:}"
    mount --bind "$HOME_DIR/${bind%%:*}" "$R${bind#*:}"
done
for bind in "$PACKAGE:/opt/podferry/src/podferry" $BINDS; do
    from=${bind%%:*} to=$R${bind#*:}
    if [ -d "$from" ]; then mkdir -p "$to"; else mkdir -p "${to%/*}"; : >> "$to"; fi
    mount --bind "$from" "$to"
    mount -o remount,bind,ro "$to"
done

hostname "$NAME"
mkdir -p "$R/share" "$R/old" "$R/var/log/podferry" "$R/run/service" "$R/etc/containerd" "$R/usr/local/sbin"
ln -sfn podferry/hosts "$R/etc/hosts"
ln -sfn podferry/hostname "$R/etc/hostname"
ln -sfn podferry/machine-id "$R/etc/machine-id"
ln -sfn ../podferry/containerd.toml "$R/etc/containerd/config.toml"
mkdir -p "$R/etc/containerd/certs.d/_default"
ln -sfn ../../../podferry/registry-hosts.toml "$R/etc/containerd/certs.d/_default/hosts.toml"
ln -sfn /etc/podferry/pki/ca.crt "$R/etc/ssl/certs/podferry-lab.pem"
ln -sfn /opt/podferry/src/podferry/node/podferry-runc "$R/usr/local/sbin/podferry-runc"
: > "$R/etc/resolv.conf"
case " $SERVICES " in *" crio "*) ln -sfn /opt/podferry/src/podferry/lab/runc-restricted "$R/usr/local/sbin/runc" ;; esac
for service in $SERVICES; do
    mkdir "$R/run/service/$service"
    cp "$PACKAGE/lab/services/$service" "$R/run/service/$service/run"
    chmod 755 "$R/run/service/$service/run"
done

cd "$R"
# pivot_root(2) by the C library: not every distribution installs pivot_root(8) (Debian testing does not).
"$PYTHON" -ISc '
import ctypes, os
if ctypes.CDLL(None, use_errno=True).pivot_root(b".", b"old"):
    raise SystemExit("pivot_root: " + os.strerror(ctypes.get_errno()))'
umount -l /old
rmdir /old
mount --make-rshared /
echo ready
exec /usr/bin/tini -g -- /usr/bin/runsvdir /run/service < /dev/null > /var/log/podferry/init.log 2>&1

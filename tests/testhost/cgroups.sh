#!/bin/sh
# Runs COMMAND beside a libvirt of its own that has cgroups, which the one of a test host has not:
#
#     unshare --mount tests/testhost/cgroups.sh COMMAND [ARGUMENT...]
#
# In a test host only. Groups of the kernel's outlive a killed test host, so all of them are below one of a known name in
# each hierarchy, which is removed at the end, and what a killed run left of it by the next. Ends with 77 where the kernel
# has no hierarchies of version 1.
set -eu
[ -e /run/vmctl-test-host ] || { echo "this is no test host" >&2; exit 1; }
# Also the one that systemd counts services in: libvirt finds it among the machine's mounts, hidden as they are in here.
controllers="cpu cpuacct cpuset memory devices freezer blkio systemd"
group=vmctl-test-cgroups

mount -t tmpfs -o mode=0755 tmpfs /run
mkdir -p /run/lock /run/user/0 /run/libvirt
: >/run/vmctl-test-host
mount -t tmpfs tmpfs /sys/fs/cgroup
for one in $controllers; do
    [ "$one" = systemd ] && option=none,name=systemd || option=$one
    mkdir "/sys/fs/cgroup/$one"
    mount -t cgroup -o "$option" "$one" "/sys/fs/cgroup/$one" 2>/dev/null || exit 77
done

remove() {
    for one in $controllers; do
        find "/sys/fs/cgroup/$one/$group" -depth -type d -exec rmdir {} + 2>/dev/null || true
    done
}
remove
daemons=
end() {
    # shellcheck disable=SC2086  one word each
    [ -z "$daemons" ] || kill $daemons 2>/dev/null || true
    wait
    remove
}
trap end EXIT
trap 'exit 143' TERM INT HUP

for one in $controllers; do
    mkdir -p "/sys/fs/cgroup/$one/$group"
    [ "$one" != cpuset ] || for file in cpuset.cpus cpuset.mems; do
        cat "/sys/fs/cgroup/cpuset/$file" >"/sys/fs/cgroup/cpuset/$group/$file"
    done
done
mkdir -p /run/libvirt/own
sed '/^cgroup_controllers/d' /etc/libvirt/qemu.conf >/run/libvirt/own/qemu.conf
mount --bind /run/libvirt/own/qemu.conf /etc/libvirt/qemu.conf
# The daemons, and so their guests, begin in that group and see it as the root of all.
inside='for one in '$controllers'; do echo $$ >"/sys/fs/cgroup/$one/'$group'/cgroup.procs"; done
exec unshare --cgroup --mount sh -c '\''
for one in '$controllers'; do
    [ "$one" = systemd ] && option=none,name=systemd || option=$one
    umount "/sys/fs/cgroup/$one"
    mount -t cgroup -o "$option" "$one" "/sys/fs/cgroup/$one"
done
exec "$@"'\'' sh "$@"'
for daemon in virtlogd libvirtd; do
    sh -c "$inside" sh $daemon &
    daemons="$daemons $!"
done
tries=0
until timeout 10 virsh -q -c qemu:///system uri >/dev/null 2>&1 </dev/null; do
    tries=$((tries + 1))
    [ $tries -lt 150 ] || { tail -n 12 /var/log/libvirt/libvirtd.log >&2; exit 1; }
    sleep 0.2
done
status=0
"$@" || status=$?
exit $status

#!/bin/sh
# The first process of a test host: furnishes the namespaces that enter.py made, starts libvirt, runs pytest.
#
#     up.sh CHECKOUT CACHE [PYTEST ARGUMENT... | --run COMMAND...]
#
# What a test may count on in here (the marker says it is in here):
#   /run/vmctl-test-host    the marker: this file exists nowhere else
#   qemu:///system          a libvirt of its own with nothing in it but the inactive network `default`
#   vmctl-user              an ordinary user with a home and a runtime folder, in group kvm, not in libvirt
#   ~/.cache/vmctl          root's is the caller's: the one thing shared with the machine, besides the checkout
#   /dev/kvm                a node of its own with group kvm, if the machine has one
#   network                 loopback and what tests make; nothing beyond
# All that is written lies on tmpfs. When this process ends, all of it is gone.
set -eu
root=$1 cache=$2
shift 2

fail() {
    printf 'cannot set up the test host: %s\nhint: %s\n' "$1" "$2" >&2
    exit 1
}

[ $$ = 1 ] || fail "this is not the first process of a pid namespace" "tests/run"
umask 022
mount -t proc proc /proc

# --- own folders --------------------------------------------------------------------------------------

# What is needed of the folders about to be hidden stays reachable through open descriptors.
python=$("$root/.venv/bin/python3" -c 'import sys; print(sys.base_prefix)')
exec 7<"$python" 8<"$cache" 9<"$root"
roots_home=$(getent passwd 0 | cut -d : -f 6)
vmctl_cache=$roots_home/.cache/vmctl

hide() { # FOLDER MODE
    # Its owner stays: swtpm's certificates are made by a user of their own.
    [ ! -d "$1" ] || mount -t tmpfs -o "mode=$2,$(stat -c uid=%u,gid=%g "$1")" tmpfs "$1"
}
hide /run 0755
hide /tmp 1777
hide /var/tmp 1777
hide /dev/shm 1777
hide /home 0755
hide "$roots_home" 0755 # traversable: the checkout and the cache may lie below
for folder in /etc/libvirt /var/lib/libvirt /var/log /var/cache/libvirt /var/lib/swtpm-localca; do
    hide "$folder" 0755
done
mkdir -p /var/log/libvirt /var/log/apt

# An ordinary user must reach the checkout by the very path its scripts name in their first line. A folder
# above it that lets no one else through is hidden too.
open_way() { # PATH
    way=
    IFS=/
    for part in ${1#/}; do
        way=$way/$part
        [ -d "$way" ] && [ "$way" != "$1" ] || break
        case $(stat -c %a "$way") in
        *[1357]) ;;
        *) hide "$way" 0755; break ;;
        esac
    done
    unset IFS
}
bring_back() { # DESCRIPTOR PATH
    [ ! "/proc/self/fd/$1" -ef "$2" ] || return 0
    mkdir -p "$2"
    # -c: the name of the descriptor must not be resolved to the hidden path it was opened by.
    mount -c --rbind "/proc/self/fd/$1" "$2"
}
open_way "$python"
open_way "$root"
bring_back 7 "$python"
bring_back 9 "$root"
bring_back 8 "$vmctl_cache"
exec 7<&- 8<&- 9<&-

world=/run/vmctl-test
mkdir -p "$world" /run/lock /run/user
chmod 1777 /run/lock

# A file of /etc, replaced for this host by the one of the same name in $world.
own_file() {
    target=/etc/$1
    [ -e "$target" ] || { # a link into the /run that was hidden
        target=$(readlink -m "$target")
        mkdir -p "${target%/*}" && : >"$target"
    }
    mount --bind "$world/$1" "$target"
}

# --- own name, own network ----------------------------------------------------------------------------

hostname=vmctl-test
echo $hostname >/proc/sys/kernel/hostname
printf '127.0.0.1 localhost\n::1 localhost\n127.0.1.1 %s\n' $hostname >"$world/hosts"
: >"$world/resolv.conf"
own_file hosts
own_file resolv.conf
ip link set lo up
echo 1 >/proc/sys/net/ipv4/ip_forward
# A fresh /sys shows this network namespace. It also has no cgroups mounted; see qemu.conf below.
mount -t sysfs sysfs /sys

# --- own users ----------------------------------------------------------------------------------------

user=vmctl-user
for file in passwd group shadow; do
    [ -e /etc/$file ] || continue
    cp -p /etc/$file "$world/$file"
    sed -i "/^$user:/d" "$world/$file"
done
uid=1000
while cut -d : -f 3 "$world/passwd" "$world/group" | grep -qx $uid; do uid=$((uid + 1)); done
echo "$user:x:$uid:$uid::/home/$user:/bin/sh" >>"$world/passwd"
echo "$user:x:$uid:" >>"$world/group"
sed -i "s/^\(kvm:.*:\)$/\1$user/; t; s/^\(kvm:.*\)$/\1,$user/" "$world/group"
for file in passwd group shadow; do
    [ ! -e "$world/$file" ] || own_file $file
done
mkdir -p "/home/$user" "/run/user/$uid" /run/user/0
chown $uid:$uid "/home/$user" "/run/user/$uid"
chmod 0700 "/run/user/$uid" /run/user/0

# --- own /dev/kvm -------------------------------------------------------------------------------------

if [ -c /dev/kvm ] && getent group kvm >/dev/null; then
    mknod "$world/kvm" c $((0x$(stat -c %t /dev/kvm))) $((0x$(stat -c %T /dev/kvm)))
    chgrp kvm "$world/kvm"
    chmod 0660 "$world/kvm"
    mount --bind "$world/kvm" /dev/kvm
fi

# --- own libvirt --------------------------------------------------------------------------------------

# Not a copy of the machine's: its guests would be started here.
mkdir -p /etc/libvirt/qemu/networks /etc/libvirt/hooks /var/lib/libvirt/images
cp /usr/share/libvirt/networks/default.xml /etc/libvirt/qemu/networks/
[ ! -d /usr/share/libvirt/nwfilter ] || cp -r /usr/share/libvirt/nwfilter /etc/libvirt/
cat >/etc/libvirt/libvirtd.conf <<END
# An identity of its own: libvirt tells hosts apart by it.
host_uuid = "$(cat /proc/sys/kernel/random/uuid)"
# No polkit in here. Group libvirt may, others may not, as on a machine where polkit decides.
unix_sock_group = "libvirt"
unix_sock_rw_perms = "0770"
auth_unix_rw = "none"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
END
cat >/etc/libvirt/qemu.conf <<END
# Folders of guests in the machine's cgroups would outlive a killed test host: nothing in here could remove them.
cgroup_controllers = []
# AppArmor profiles are loaded into the machine's kernel and would outlive it too.
security_driver = "none"
END

unset DBUS_SESSION_BUS_ADDRESS DBUS_SYSTEM_BUS_ADDRESS SSH_AUTH_SOCK DISPLAY WAYLAND_DISPLAY TMPDIR
unset XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME XDG_STATE_HOME LIBVIRT_DEFAULT_URI VIRSH_DEFAULT_CONNECT_URI
unset SUDO_USER SUDO_UID SUDO_GID SUDO_COMMAND
export HOME="$roots_home" USER=root LOGNAME=root XDG_RUNTIME_DIR=/run/user/0

for daemon in virtlogd libvirtd; do
    $daemon -d </dev/null || fail "$daemon did not start" "sh -x $0"
done
tries=0
until answer=$(timeout 10 virsh -q -c qemu:///system uri 2>&1 </dev/null); do
    tries=$((tries + 1))
    [ $tries -lt 150 ] || {
        tail -n 12 /var/log/libvirt/libvirtd.log | sed 's/^/    /' >&2
        fail "its libvirt does not answer (${answer##*error: })" "the last of its log is above"
    }
    sleep 0.2
done
: >/run/vmctl-test-host

# This shell stays, to reap what others leave; when it ends, the kernel ends everything in here.
cd "$root"
if [ "${1-}" = --figures-only ]; then
    # A report, not a test: a machine that others share may be slow today.
    for bench in "commands.py 7" "boot.py 3" "snapshots.py 3 10" "placement.py 1000 20000"; do
        # shellcheck disable=SC2086  name and numbers are words
        "$root/.venv/bin/python3" tests/perf/$bench || echo "no figures from tests/perf/$bench" >&2
    done
    exit 0
fi
status=0
if [ "${1-}" = --run ]; then
    shift
    hide /srv 0755 # tests make folders of their own there, for what a tmpfs cannot show, and take them away
    "$@" || status=$?
    exit $status
fi
"$root/.venv/bin/python3" -m pytest "$@" || status=$?
exit $status

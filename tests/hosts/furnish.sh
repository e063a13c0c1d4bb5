#!/bin/sh
# The first process of one host of a testbed: furnishes the namespaces that enter.py made, starts sshd and libvirt.
#
#     furnish.sh FOLDER NAME ADDRESS/PREFIX
#
# FOLDER, which files.py fills, is what stays of the host when it loses power. This says `entered` on stdout, hears `wired` on stdin once eth0 is there, and says `up` at the end.
set -eu
folder=$1 name=$2 address=$3

[ $$ = 1 ] || { echo "this is not the first process of a pid namespace" >&2; exit 1; }
umask 022
mount -t proc proc /proc
echo "$name" >/proc/sys/kernel/hostname

# --- own folders: what is seen of the folder must outlive the hiding of /run ---------------------------------------
cd "$folder"
if [ -d shared ]; then
    mkdir -p disk/vmctl
    mount -c --bind shared disk/vmctl
fi
mount -c --rbind etc-libvirt /etc/libvirt
mount -c --rbind disk /var/lib/libvirt
mount -c --rbind log /var/log/libvirt
mount -c --rbind root "$(getent passwd 0 | cut -d : -f 6)"
for file in hosts machine-id passwd group shadow; do
    mount -c --bind "$file" "/etc/$file"
done
[ ! -d pki ] || { mkdir -p /etc/pki && mount -c --rbind pki /etc/pki; }
exec 7<own
cd /
for part in /run /tmp /var/tmp /dev/shm /var/cache/libvirt; do
    mount -t tmpfs tmpfs $part
done
chmod 1777 /tmp /var/tmp /dev/shm
mkdir -p /run/sshd /run/lock /run/testbed
mount -c --rbind /proc/self/fd/7 /run/testbed
exec 7<&-

# --- own network ---------------------------------------------------------------------------------------------------
echo entered
read -r answer
[ "$answer" = wired ]
mount -t sysfs sysfs /sys
ip link set lo up
# The same card after each boot, as a machine's is: who knew it before its power was lost reaches it at once.
octets=${address%/*}
# shellcheck disable=SC2046,SC2086  four words
mac=$(printf '06:00:%02x:%02x:%02x:%02x' $(echo $octets | tr . ' '))
ip link add lan0 address "$mac" type bridge stp_state 0 forward_delay 0
ip link set eth0 up master lan0
ip addr add "$address" dev lan0
ip link set lan0 up

# --- daemons -------------------------------------------------------------------------------------------------------
unset DBUS_SESSION_BUS_ADDRESS DBUS_SYSTEM_BUS_ADDRESS SSH_AUTH_SOCK TMPDIR XDG_RUNTIME_DIR XDG_CACHE_HOME
unset XDG_CONFIG_HOME XDG_DATA_HOME LIBVIRT_DEFAULT_URI VIRSH_DEFAULT_CONNECT_URI VMCTL_CONNECT
HOME=$(getent passwd 0 | cut -d : -f 6)
export HOME
for daemon in sshd virtlogd libvirtd; do
    /run/testbed/daemon $daemon
done
echo up
exec 0</dev/null 1>&- # nobody waits for the end of it
# dash waits for any child, so this reaps what others leave.
while :; do
    sleep 1000 &
    wait
done

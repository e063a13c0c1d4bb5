#!/bin/sh
# The first process of a bare machine beside a testbed: a Debian of its own with an SSH server, and nothing else.
#
#     bare.sh FOLDER NAME ADDRESS/PREFIX
#
# FOLDER/root is its file system. Says and hears the same as furnish.sh.
set -eu
folder=$1 name=$2 address=$3

[ $$ = 1 ] || { echo "this is not the first process of a pid namespace" >&2; exit 1; }
umask 022
echo "$name" >/proc/sys/kernel/hostname 2>/dev/null || hostname "$name"
cd "$folder/root"
mount --bind . .
cd "$folder/root"
mount -t proc proc proc
mount -t tmpfs -o mode=0755,nosuid tmpfs dev
mkdir dev/pts dev/shm dev/net
for node in null zero full random urandom tty net/tun; do
    mknod -m 666 "dev/$node" c $((0x$(stat -c %t "/dev/$node"))) $((0x$(stat -c %T "/dev/$node")))
done
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for folder in run tmp dev/shm; do
    mount -t tmpfs -o mode=1777 tmpfs $folder
done
mkdir -m 755 run/sshd run/lock
echo entered
read -r answer
[ "$answer" = wired ]
mount -t sysfs sysfs sys
ip link set lo up
ip addr add "$address" dev eth0
ip link set eth0 up
echo 1 >/proc/sys/net/ipv4/ip_forward
mkdir -p old
pivot_root . old
cd /
umount -l /old
rmdir /old
exec env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin sh -c '
/usr/sbin/sshd -E /var/log/sshd.log
echo up
exec 0</dev/null 1>&-
while :; do
    sleep 1000 &
    wait
done'

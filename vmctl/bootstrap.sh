#!/bin/sh
# Prepares this machine for vmctl, then becomes the command given:
#
#     sh vmctl/bootstrap.sh vmctl demo
#     sh vmctl/bootstrap.sh tests/run
#
# It installs the missing packages of vmctl/packages.debian, makes .venv beside vmctl/ with vmctl in it,
# and sees to it that libvirt answers. What is there already is left alone. Everything it says goes to
# stderr; stdout belongs to the command.
#
#     --with SECTION    add that section of packages.debian, and the Python extra of the same name
#     --no-packages     the packages are there (other distributions than Debian): do not look
#     VMCTL_PYTHON      the Python .venv is made from; /usr/bin/python3, so that every user can run it
set -eu
PATH=$PATH:/usr/sbin:/sbin # libvirtd lives there; an ordinary user's PATH may lack it

say() { printf 'vmctl set-up: %s\n' "$*" >&2; }

die() { # OBJECT REASON HINT
    printf 'cannot set up %s: %s\nhint: %s\n' "$1" "$2" "$3" >&2
    exit 1
}

# logged OBJECT HINT COMMAND...: runs it with its output in the log, or dies with the log's last lines.
logged() {
    object=$1 hint=$2
    shift 2
    open_log
    printf '\n+ %s\n' "$*" >>"$log"
    if "$@" >>"$log" 2>&1 </dev/null; then return 0; else status=$?; fi
    tail -n 12 "$log" | sed 's/^/    /' >&2
    die "$object" "$1 failed with status $status; all it said is in $log" "$hint"
}

# One log a run: two runs at once must not write into each other's. Only failures keep theirs.
log=
open_log() {
    [ -z "$log" ] || return 0
    folder=${XDG_CACHE_HOME:-${HOME:-/var}/.cache}/vmctl
    mkdir -p "$folder" 2>/dev/null && [ -w "$folder" ] || folder=${TMPDIR:-/tmp}
    log=$(mktemp "$folder/set-up.XXXXXX")
    trap 'say "interrupted; the next set-up goes on from here"; exit 130' INT TERM HUP
}

# section NAME: the packages of that section.
section() {
    awk -v wanted="[$1]" '
        { sub(/#.*/, "") }
        $1 ~ /^\[/ { on = ($1 == wanted); found += on; next }
        on && NF { print $1 }
        END { exit !found }' "$list"
}

sections=run extras='' look_at_packages=yes
while [ $# -gt 0 ]; do
    case $1 in
    --with)
        [ $# -ge 2 ] || die vmctl "--with needs the name of a section" "sh $0 --with test"
        sections="$sections $2" extras="$extras $2"
        shift 2
        ;;
    --no-packages) look_at_packages=no; shift ;;
    -h | --help) sed -n '2,/^set -eu/{s/^# \{0,1\}//;/^set -eu/!p}' "$0"; exit 0 ;;
    --) shift; break ;;
    -*) die vmctl "no such option: $1" "sh $0 --help" ;;
    *) break ;;
    esac
done

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
list=$root/vmctl/packages.debian
venv=$root/.venv
python=${VMCTL_PYTHON:-/usr/bin/python3}
callers_umask=$(umask)
umask 022 # other users must be able to run what is made here

# --- packages ----------------------------------------------------------------------------------------

is_debian() {
    command -v dpkg-query >/dev/null && command -v apt-get >/dev/null || return 1
    case " $(. /etc/os-release 2>/dev/null && echo "${ID-} ${ID_LIKE-}") " in
    *" debian "*) ;;
    *) return 1 ;;
    esac
}

# The wanted packages that are not installed, by one question to dpkg.
missing() {
    { dpkg-query -W -f '${Package} ${db:Status-Status}\n' -- "$@" 2>/dev/null || :; } |
        awk -v wanted="$*" '
            $2 == "installed" { have[$1] = 1 }
            END { n = split(wanted, name); for (i = 1; i <= n; i++) if (!(name[i] in have)) print name[i] }'
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

install_packages() {
    wanted=$(for name in $sections; do
        section "$name" || die packages "packages.debian has no section [$name]" "look into $list"
    done) || exit
    if ! is_debian; then
        system=$(. /etc/os-release 2>/dev/null && echo "${PRETTY_NAME-}")
        die packages "this is not Debian but ${system:-unknown to me}" \
            "install what these Debian packages hold, then add --no-packages: $(echo $wanted)"
    fi
    lacking=$(missing $wanted)
    [ -n "$lacking" ] || return 0
    set -- $lacking
    count="$# packages"
    [ $# -gt 1 ] || count="1 package"
    by_hand="apt-get install --no-install-recommends $*"
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null && { sudo -n true 2>/dev/null || { [ -t 0 ] && sudo -v; }; } ||
            die packages "$count missing, and only root can install what is" "as root: $by_hand"
    fi
    open_log
    say "installing $count: $*"
    # An unreachable third-party source fails this too, and need not matter: install has the last word.
    as_root apt-get -q update >>"$log" 2>&1 </dev/null ||
        say "apt-get update failed (see $log); going on with the package lists there are"
    # The lock waits for another apt; a chroot that cannot start services says so in the log, harmlessly.
    logged packages "$by_hand" as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y \
        -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 \
        -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold \
        install --no-install-recommends "$@"
}

# --- .venv -------------------------------------------------------------------------------------------

# What .venv was made from. A change of any of it makes the package be installed again.
venv_digest() {
    (
        cd "$root"
        guests=
        [ ! -d vmctl/baremetal ] || guests=$(find vmctl/baremetal -type f \
            ! -name '*.elf' ! -name '*.o' ! -path '*/__pycache__/*' | LC_ALL=C sort)
        { echo "$root $python_is"; sha256sum pyproject.toml vmctl/packages.debian $guests; } | sha256sum
    ) | cut -d ' ' -f 1
}

# The stamp is "DIGEST EXTRA...", written last. An extra once added stays.
venv_is_ready() {
    [ -x "$venv/bin/vmctl" ] && read -r digest installed 2>/dev/null <"$stamp" || return 1
    [ "$digest" = "$wanted_digest" ] || return 1
    for extra in $extras; do
        case " $installed " in *" $extra "*) ;; *) return 1 ;; esac
    done
}

# Why .venv, if there is one, cannot be kept.
venv_fault() {
    if [ -e "$venv/.unfinished" ]; then echo "an earlier set-up was interrupted"
    elif [ "$(readlink -f "$venv/bin/python3")" != "$(readlink -f "$python")" ]; then echo "it has another Python"
    elif [ ! -d "$venv/lib/python${python_is%.*}" ]; then echo "it is of another Python version"
    elif ! grep -qF "$venv/bin/python" "$venv/bin/pip" 2>/dev/null; then echo "it was made in another folder"
    fi
}

make_venv() {
    if venv_is_ready; then return 0; fi # another set-up made it while this one waited
    installed=
    if [ -e "$stamp" ]; then read -r _ installed <"$stamp" || :; fi
    # From here to the new stamp .venv is unfinished; a run that dies between leaves this mark.
    fault=
    [ ! -e "$venv/pyvenv.cfg" ] && [ ! -e "$venv/.unfinished" ] || fault=$(venv_fault)
    rm -f "$stamp"
    if [ -n "$fault" ]; then
        say "making .venv anew: $fault"
        # All but the lock: who waits for it must be waiting for the same file.
        find "$venv" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
    fi
    : >"$venv/.unfinished"
    if [ ! -e "$venv/pyvenv.cfg" ]; then
        [ -n "$fault" ] || say "making .venv from $python ($python_is)"
        logged .venv "python3-venv must fit $python" "$python" -m venv "$venv"
    fi
    all=$(for extra in $installed $extras; do echo "$extra"; done | sort -u)
    names=$(echo $all | tr ' ' ,)
    say "installing vmctl${names:+ and its extra $names} into .venv"
    logged vmctl "mend what pip says, then run this again" "$venv/bin/python3" -m pip install \
        --disable-pip-version-check --no-input --progress-bar off --editable "$root${names:+[$names]}"
    # Whoever may not write here, or whose Python writes no bytecode, would compile vmctl anew for each command.
    logged vmctl "see its output above" "$venv/bin/python3" -m compileall -q "$root/vmctl"
    rm -f "$venv/.unfinished"
    echo "$wanted_digest" $all >"$stamp"
}

ensure_venv() {
    [ -x "$python" ] || die .venv "there is no $python" "set VMCTL_PYTHON to a Python 3.11 or newer"
    python_is=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(sys.version_info < (3, 11))') ||
        die .venv "$python is Python ${python_is:-of no kind}, and vmctl needs 3.11" \
            "set VMCTL_PYTHON to a Python 3.11 or newer"
    stamp=$venv/.vmctl
    wanted_digest=$(venv_digest)
    if venv_is_ready; then return 0; fi
    mkdir -p "$venv" 2>/dev/null && true 2>/dev/null >>"$venv/.lock" ||
        die .venv "$venv is not yours to write" "run this as the owner of $root"
    # In a subshell, so that nothing started later (libvirtd!) inherits the lock.
    (
        flock --nonblock 9 || {
            say "waiting for another set-up of $root"
            flock --timeout 1800 9 || die .venv "another set-up has held $venv/.lock for half an hour" "see what it is at"
        }
        make_venv
        [ -z "$log" ] || rm -f "$log"
    ) 9>>"$venv/.lock"
}

# --- /dev/kvm ----------------------------------------------------------------------------------------

# Where no udev runs, /dev/kvm is root's alone. libvirtd then probes QEMU with KVM, finds that QEMU's own
# user cannot open it, distrusts its cache, and probes again at every start of a guest: a minute each.
open_kvm() {
    [ -c /dev/kvm ] && [ "$(id -u)" = 0 ] || return 0
    case $(stat -c '%G:%a' /dev/kvm) in kvm:*6[0-7] | kvm:*7[0-7] | *[67]) return 0 ;; esac
    if chgrp kvm /dev/kvm 2>/dev/null && chmod 660 /dev/kvm 2>/dev/null; then
        say "gave /dev/kvm to group kvm: libvirt would probe QEMU anew at every start otherwise"
    else
        say "could not give /dev/kvm to group kvm: each start of a guest may take a minute"
    fi
}

# --- libvirt -----------------------------------------------------------------------------------------

# In a session of its own virsh has no terminal for polkit to ask a password on.
answers() { setsid --wait timeout 10 virsh -q -c "$1" uri >/dev/null 2>&1 </dev/null; }

why_not() { setsid --wait timeout 10 virsh -q -c "$1" uri 2>&1 </dev/null | tail -n 1; }

# alive NAME: whether the daemon of that name holds its pid file; a stale file does not count.
alive() {
    pid=$(cat "/run/$1.pid" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ]
}

all_on() { # UNIT...
    for unit in "$@"; do
        systemctl -q is-active "$unit" && systemctl -q is-enabled "$unit" || return 1
    done
}

start_by_systemd() {
    if systemctl cat libvirtd.service >/dev/null 2>&1; then
        sockets=libvirtd.socket
    else # split into a daemon a driver; each is started by its socket
        sockets='virtqemud.socket virtnetworkd.socket virtstoraged.socket virtnodedevd.socket virtsecretd.socket virtnwfilterd.socket'
    fi
    # It runs, and does not answer this user: that is for group libvirt, not for systemd, to change.
    if all_on virtlogd.socket $sockets; then return 0; fi
    say "systemctl enable --now virtlogd.socket $sockets"
    logged libvirt "systemctl status virtlogd.socket $sockets" as_root systemctl enable --now virtlogd.socket $sockets
}

# libvirt gives each guest a /dev of its own and furnishes it by setns, which in a chroot leads out of the
# chroot: the guest's /dev stays empty, and the nodes go into that of the system around. So not in a chroot.
keep_out_of_namespaces() {
    [ "$(nsenter --mount=/proc/self/ns/mnt stat -c %d:%i / 2>/dev/null)" != "$(stat -c %d:%i /)" ] || return 0
    conf=/etc/libvirt/qemu.conf
    ! grep -q '^ *namespaces *=' $conf || return 0
    printf '\n# A chroot: see vmctl/bootstrap.sh.\nnamespaces = []\n' >>$conf
    say "this is a chroot: wrote 'namespaces = []' into $conf, or no guest would start"
}

# lost_race NAME: whether it failed only because another set-up started it first.
lost_race() {
    sleep 0.5 # between taking its pid file and writing it
    alive "$1"
}

# libvirt waits for a killed QEMU until pid 1 has reaped it, and who knows what pid 1 is where no systemd runs.
daemonized() { # DAEMON
    if [ "$1" = libvirtd ]; then "$python" "$root/vmctl/reaper.py" "$1" -d; else "$1" -d; fi
}

start_by_hand() { # DAEMON...
    for daemon in "$@"; do
        if alive "$daemon"; then continue; fi
        say "starting $daemon (no systemd here)"
        open_log
        daemonized "$daemon" >>"$log" 2>&1 </dev/null || lost_race "$daemon" || {
            tail -n 12 "$log" | sed 's/^/    /' >&2
            die libvirt "$daemon did not start; all it said is in $log" "run $daemon in the foreground"
        }
    done
}

ensure_libvirt() {
    open_kvm
    if [ "$(id -u)" = 0 ] && [ ! -d /run/systemd/system ]; then
        # virtlogd is asked for even if libvirt answers: without it the first guest fails to start.
        if answers qemu:///system; then start_by_hand virtlogd; return 0; fi
        keep_out_of_namespaces
        start_by_hand virtlogd libvirtd
    elif answers qemu:///system; then
        return 0
    elif [ "$(id -u)" = 0 ] || { [ -d /run/systemd/system ] && sudo -n true 2>/dev/null; }; then
        start_by_systemd
    fi
    tries=0
    until answers qemu:///system; do
        tries=$((tries + 1))
        if [ "$(id -u)" != 0 ] && answers qemu:///session; then
            say "qemu:///system does not answer to $(id -un); vmctl will use qemu:///session"
            return 0
        fi
        [ $tries -lt 50 ] || die libvirt "qemu:///system does not answer ($(why_not qemu:///system))" \
            "see the libvirt daemon's log; an ordinary user must be in group libvirt"
        sleep 0.2
    done
}

[ $look_at_packages = no ] || install_packages
ensure_venv
ensure_libvirt
[ -z "$log" ] || rm -f "$log"

case ${1-}:$PATH: in
vmctl:*:"$venv/bin":*) ;;
vmctl:*) export VMCTL_SHELL="sh $0 bash" ;; # what vmctl demo names, with which its path ends
esac
PATH=$venv/bin:$PATH
export PATH
export VIRTUAL_ENV="$venv"
if [ $# = 0 ]; then
    say "ready; next: $venv/bin/vmctl --help"
    exit 0
fi
command -v -- "$1" >/dev/null || {
    printf 'cannot run %s: there is no such command\nhint: cd %s\n' "$1" "$root" >&2
    exit 127
}
trap - INT TERM HUP
umask "$callers_umask"
exec "$@"

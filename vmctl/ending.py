"""A shell script for the guest that ends a command, however many processes it has become.

A server passes a signal of the client on to one process only, or to none (dropbear to the shell, OpenSSH for root);
and when a connection is gone, processes without a terminal never hear of it.
"""

# All processes below the nearest SSH server above this shell are the connection's; this shell's own are left alone.
# With a process given instead: that one and all below it. What was found is remembered: the connection may go then.
SCRIPT = r"""
roots=${1-}
list() {
    cat /proc/[0-9]*/stat 2>/dev/null | awk -v self=$$ -v roots="$roots" '
        {
            rest = name = $0
            sub(/^[^(]*\(/, "", name); sub(/\)[^)]*$/, "", name)
            sub(/^.*\) /, "", rest); split(rest, part, " ")
            if (part[1] != "Z") { up[$1] = part[2]; called[$1] = name }
        }
        END {
            count = split(roots, given, " ")
            for (i = 1; i <= count; i++) wanted[given[i]] = 1
            if (!count) {
                for (top = self; top > 1 && called[top] !~ /^(sshd|dropbear)/; top = up[top]) mine = top
                if (top <= 1) exit
                for (pid in up) if (up[pid] == top && pid != mine) wanted[pid] = 1
            }
            for (pid in up) {
                for (at = pid; at > 1 && !(at in wanted); at = up[at]);
                if (at in wanted) print pid
            }
        }'
}
for signal in INT TERM KILL; do
    found=$(list)
    [ "$found" ] || exit 0
    roots=$(echo $roots $found)
    kill -s $signal $found 2>/dev/null || sudo -n kill -s $signal $found 2>/dev/null
    for turn in 1 2 3 4 5 6 7 8; do [ "$(list)" ] || exit 0; sleep 0.2; done
done
"""

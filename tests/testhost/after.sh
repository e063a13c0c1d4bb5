#!/bin/sh
# Becomes COMMAND when a preparation has gone well:
#
#     after.sh PREPARATION COMMAND [ARGUMENT...]
#
# PREPARATION is for sh. It has namespaces of its own (enter.py): ending this process, by any signal, ends all of it.
set -eu
preparation=$1
shift
setpriv --pdeathsig TERM python3 "$(dirname -- "$0")/enter.py" --share-network \
    sh -c "set -e; mount -t proc proc /proc; $preparation"
exec "$@"

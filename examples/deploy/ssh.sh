#!/bin/sh
# A cluster for the time of one program, on machines that ssh reaches without a password, with CluPy for the same Python:
#   HOSTS="one two" sh ssh.sh program.py [ARGUMENT ...]
set -eu
python=${PYTHON:-python3}
port=${CLUPY_PORT:-7878}
CLUPY_SECRET=$("$python" -c 'import secrets; print(secrets.token_hex(32))')
CLUPY_MASTER=$(hostname):$port
export CLUPY_SECRET CLUPY_MASTER

"$python" -m clupy master --listen "$port" & pids=$!
trap 'kill $pids 2>/dev/null || true; wait' EXIT
trap 'exit 143' HUP INT TERM
for host in $HOSTS; do
    # The secret goes by standard input, since others can read command lines.  When that ends, whatever ended this script or
    # the connection, so does the server; the empty lines let this end of it notice.
    { echo "$CLUPY_SECRET"; while sleep 2; do echo; done; } | ssh -o BatchMode=yes "$host" "sh -c '
        read -r CLUPY_SECRET; export CLUPY_SECRET
        $python -m clupy serve --master $CLUPY_MASTER --drain-time 5s </dev/null & server=\$!
        cat >/dev/null; kill \$server; wait'" &
    pids="$pids $!"
done

tries=0
until "$python" -m clupy status --expect "$(echo "$HOSTS" | wc -w)" >/dev/null 2>&1; do
    tries=$((tries + 1))
    test "$tries" -lt 60 || { echo "ssh.sh: not all servers have come; why, they say above" >&2; exit 1; }
    sleep 1
done
"$python" "$@"

#!/bin/sh
# A cluster for the time of one job:   sbatch slurm.sh program.py [ARGUMENT ...]
#SBATCH --job-name=clupy
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=01:00:00
set -eu
python=${PYTHON:-python3}
port=$((20000 + SLURM_JOB_ID % 10000))          # so that jobs that share a node do not meet

# The secret is this job's alone, and on no command line: srun hands the environment on.
CLUPY_SECRET=$("$python" -c 'import secrets; print(secrets.token_hex(32))')
CLUPY_MASTER=$(hostname):$port
export CLUPY_SECRET CLUPY_MASTER

"$python" -m clupy master --listen "$port" & master=$!
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$python" -m clupy serve --drain-time 5s & servers=$!
trap 'kill $master $servers 2>/dev/null || true; wait' EXIT
trap 'exit 143' HUP INT TERM

until "$python" -m clupy status --expect "$SLURM_NNODES" >/dev/null 2>&1; do
    kill -0 "$master" && kill -0 "$servers"     # else they failed, and said why
    sleep 1
done
"$python" "$@"

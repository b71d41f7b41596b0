#!/usr/bin/env bash
# The commands that cluster.yaml and cluster-local.yaml run on the machines of a cluster:
#
#   cluster.sh node      on every machine: install the project and write the environment
#   cluster.sh folder    on machines that others use too: make Ray's temporary folder; refuse one that others can enter
#   cluster.sh head      on the head: make Ray's token and MLflow's password; add the addresses to the environment
#   cluster.sh mps       on machines with GPUs, before Ray: start CUDA's MPS, under which trials share a GPU with gain
#   cluster.sh mlflow    on the head: (re)start the MLflow server, which ends when Ray ends
#   cluster.sh watch     on workers: when the head is gone, end Ray and MPS; then run the rest of the command line
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

ENVIRONMENT=~/.ram-study.env # every shell reads it, and so do Ray, its job server and all trials
MLFLOW_PORT=5001             # not 5000, which macOS uses: the port is forwarded to laptops
PASSWORD=~/.mlflow-password  # of MLflow's user admin, if RAM_MLFLOW_LOGIN is set
MPS=${RAY_TMPDIR:-/tmp}/ram-mps
MLFLOW=http://127.0.0.1:$MLFLOW_PORT

node() {
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: Python must be 3.11 or newer; $(hostname) has $(python3 --version 2>&1): install a newer one" >&2
        exit 1
    fi
    if ! sha256sum --check --status .venv/installed 2> /dev/null; then
        python3 -m venv .venv
        .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[cluster]'
        sha256sum pyproject.toml constraints.txt > .venv/installed
    fi
    chmod 600 ~/cluster.yaml # it may hold the keys of the storage
    (umask 077 && environment > "$ENVIRONMENT")
    # shellcheck disable=SC1090
    . "$ENVIRONMENT"
    folder
    # The first line of the file, because the usual ~/.bashrc ends early in shells without a terminal.
    local line="[ ! -f $ENVIRONMENT ] || . $ENVIRONMENT" bashrc=""
    [ ! -f ~/.bashrc ] || bashrc=$(cat ~/.bashrc)
    [[ $bashrc == "$line"* ]] || printf '%s\n%s\n' "$line" "$bashrc" > ~/.bashrc
}

folder() { # Ray keeps its sockets there, and the code that workers load
    [ -n "${RAY_TMPDIR-}" ] || return 0
    mkdir -p -m 700 "$RAY_TMPDIR"
    if [ -L "$RAY_TMPDIR" ] || [ ! -O "$RAY_TMPDIR" ] || [ -n "$(find "$RAY_TMPDIR" -prune -perm /077)" ]; then
        local fact
        fact="$RAY_TMPDIR on $(hostname) is $(stat -c '%A, of %U' "$RAY_TMPDIR")"
        echo "error: RAY_TMPDIR must be a folder that only $(id -un) can enter; $fact: remove it, or name another" >&2
        exit 1
    fi
}

environment() { # metadata: environment: of the cluster's yaml, then what is the same for all clusters
    .venv/bin/python - ~/cluster.yaml << 'PYTHON'
import shlex, sys, yaml

with open(sys.argv[1]) as file:
    for name, value in yaml.safe_load(file)["metadata"]["environment"].items():
        print(f"export {name}={shlex.quote(str(value))}")
PYTHON
    echo "export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0"
    echo "export PATH=\"$PWD/.venv/bin:\$PATH\""
    # Where trials find MPS; for the driver, it means that they may share GPUs. A folder that `metadata` names stays.
    echo "export CUDA_MPS_PIPE_DIRECTORY=\"\${CUDA_MPS_PIPE_DIRECTORY:-\${RAY_TMPDIR:-/tmp}/ram-mps/pipe}\""
}

head() {
    if [ ! -s ~/.ray/auth_token ]; then
        (umask 077 && .venv/bin/ray get-auth-token --generate > /dev/null)
    fi
    chmod 600 ~/.ray/auth_token
    if [ -n "${RAM_MLFLOW_LOGIN-}" ]; then
        [ -s "$PASSWORD" ] ||
            (umask 077 && .venv/bin/python -c 'import secrets; print(secrets.token_urlsafe(24))' > "$PASSWORD")
        echo "export MLFLOW_TRACKING_USERNAME=admin MLFLOW_TRACKING_PASSWORD=$(cat "$PASSWORD")" >> "$ENVIRONMENT"
    fi
    echo "export RAY_ADDRESS=auto MLFLOW_TRACKING_URI=$MLFLOW" >> "$ENVIRONMENT"
}

mps() {
    compgen -G "/dev/nvidia[0-9]*" > /dev/null || return 0
    [ "${CUDA_MPS_PIPE_DIRECTORY-}" != "$MPS/pipe" ] || .venv/bin/python -m study.mps start "$MPS"
}

mlflow() {
    local old
    old=$(cat ~/.mlflow.pid 2> /dev/null || true)
    if [ -n "$old" ] && grep --quiet --text cluster.sh "/proc/$old/cmdline" 2> /dev/null; then
        kill "$old"
        while kill -0 "$old" 2> /dev/null; do sleep 0.5; done
    fi
    if answers; then
        echo "error: port $MLFLOW_PORT must be free for the MLflow server; something answers there: end it, or change MLFLOW_PORT in cluster.sh" >&2
        exit 1
    fi
    setsid nohup bash cluster.sh serve > ~/mlflow.log 2>&1 < /dev/null &
    echo $! > ~/.mlflow.pid
    for _ in $(seq 180); do
        kill -0 $! 2> /dev/null || break
        ! answers || return 0
        sleep 1
    done
    tail -n 20 ~/mlflow.log
    echo "error: the MLflow server must answer within 3 minutes; it did not: see ~/mlflow.log on the head" >&2
    exit 1
}

answers() {
    .venv/bin/python -c "import urllib.request as r; r.urlopen('$MLFLOW/health', timeout=1)" 2> /dev/null
}

serve() { # on loopback; other machines reach it through SSH
    trap 'trap "" TERM; kill -- -$$; wait' EXIT # the whole session that `mlflow` above made
    trap 'exit 0' TERM
    local login=()
    if [ -n "${RAM_MLFLOW_LOGIN-}" ]; then
        umask 077 # it keeps its users beside
        printf '%s\n' '[mlflow]' 'default_permission = NO_PERMISSIONS' 'admin_username = admin' \
            "database_uri = sqlite:///$HOME/.mlflow-users.db" > ~/.mlflow-users.ini
        MLFLOW_AUTH_ADMIN_PASSWORD=$(cat "$PASSWORD")
        export MLFLOW_AUTH_CONFIG_PATH=~/.mlflow-users.ini MLFLOW_AUTH_ADMIN_PASSWORD
        export MLFLOW_FLASK_SERVER_SECRET_KEY=$MLFLOW_AUTH_ADMIN_PASSWORD
        login=(--app-name basic-auth)
    fi
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false .venv/bin/mlflow server --host 127.0.0.1 --port $MLFLOW_PORT --workers 2 \
        --allowed-hosts "127.0.0.1:$MLFLOW_PORT,localhost:$MLFLOW_PORT" \
        --backend-store-uri "sqlite:///$HOME/mlflow.db" \
        --artifacts-destination "${RAM_STORAGE%/}/mlflow-artifacts" "${login[@]}" &
    while kill -0 $! 2> /dev/null && pgrep --euid "$(id -u)" --exact gcs_server > /dev/null; do
        sleep 2
    done
}

watch() { # without its head a raylet ends after a minute, but its agents and the machine do not
    setsid nohup flock --nonblock ~/.ram-study.watch bash cluster.sh when_alone "$@" > /dev/null 2>&1 < /dev/null &
}

when_alone() {
    while pgrep --euid "$(id -u)" --exact raylet > /dev/null; do
        sleep 5
        # During a restart there is no raylet for a moment.
        pgrep --euid "$(id -u)" --exact raylet > /dev/null || sleep 60
    done
    .venv/bin/ray stop --force || true
    .venv/bin/python -m study.mps end "$MPS" || true
    "$@"
}

case ${1-} in
node | folder | head | mps | mlflow | serve | watch | when_alone) "$@" ;;
*) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac

#!/usr/bin/env bash
# budgets.sh [MAKE_VARIABLE=VALUE...]: times installation, tests and demo in a fresh clone of this repository, against the
# budgets for two cores, and prints the table that stands in docs/numbers/budgets.md.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git clone --quiet "$repository" "$folder/llmpipe"
cd "$folder/llmpipe"

seconds() { # seconds TARGET...: runs make, prints how long it took
    local start=$EPOCHSECONDS
    make "$@" > "$folder/make.log" 2>&1 || { tail -40 "$folder/make.log" >&2; exit 1; }
    echo $((EPOCHSECONDS - start))
}

install=$(seconds setup "$@")
tests=$(seconds test "$@")
demo=$(seconds demo "$@")
again=$(seconds demo "$@")
model=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)
cat << TABLE
| what | seconds | budget |
|---|---:|---:|
| installation (\`make setup\`) | $install | 240 |
| \`make test\` | $tests | 480 |
| \`make demo\` after installation | $demo | 360 |
| \`make demo\` again | $again | some |

$(date +%F), $(nproc) cores of $model, $(awk '/MemTotal/ {printf "%.0f", $2 / 2**20}' /proc/meminfo) GiB,
$(.venv/bin/python -c 'import platform, torch; print("Python", platform.python_version() + ", torch", torch.__version__)'), commit $(git rev-parse --short HEAD).
TABLE

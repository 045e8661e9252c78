#!/usr/bin/env bash
# What `make test-cluster` needs beside Python: installed where that may be done, else told in one line.
set -euo pipefail
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

one_of() { # one_of COMMAND...: is one of them here?
    local command
    for command; do
        if command -v "$command" > /dev/null; then return 0; fi
    done
    return 1
}

missing=()
one_of slurmctld || missing+=(slurm-wlm)
one_of munged || missing+=(munge)
one_of chromium chromium-browser google-chrome || missing+=(chromium)
[ ${#missing[@]} -gt 0 ] || exit 0

install=(apt-get install -y --no-install-recommends "${missing[@]}")
if [ "$(id -u)" != 0 ] || ! one_of apt-get; then
    echo "The cluster tests need ${missing[*]}: run 'sudo ${install[*]}', then make again" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
"${install[@]}" || { apt-get update && "${install[@]}"; }

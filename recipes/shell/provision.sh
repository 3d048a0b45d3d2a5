#!/bin/sh
# From nothing to complete, proved models. Run it as often as you like: what is right already costs no network.
#
#   WHEEL=mistral_fetch-0.1.0-py3-none-any.whl sh provision.sh /etc/mistral-fetch/mistral-fetch.toml
set -eu
wanted=${1:-mistral-fetch.toml}
prefix=${PREFIX:-/opt/mistral-fetch}
wheel=${WHEEL:-https://files.example/mistral_fetch-0.1.0-py3-none-any.whl}

# Its own environment: no package of the machine can change what runs here, nor the other way round.
if ! test -x "$prefix/bin/mistral-fetch"; then
    python3 -m venv "$prefix"
    "$prefix/bin/pip" install --quiet "mistral-fetch[runtime,serve] @ $wheel"
fi
PATH=$prefix/bin:$PATH

report=$(mktemp)
trap 'rm -f "$report"' EXIT
# --frozen: these bytes, or a failure; a machine that starts up is no place to decide what a model is.
mistral-fetch sync --frozen --json --quiet --file "$wanted" >"$report"

# sync goes by what was verified when it came. A disk that has rotted since is only found by reading it.
"$prefix/bin/python" -c 'import json, sys; print(*(m["ref"] for m in json.load(sys.stdin)["models"]), sep="\n")' <"$report" |
    while read -r ref; do
        mistral-fetch repair "$ref" --quiet >&2
    done

cat "$report"

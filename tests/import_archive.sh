#!/usr/bin/env bash
# import_archive.sh PYTHON ARCHIVE: install a wheel or source archive into an environment of its own, import it and run a program.
# What it depends on is taken from PYTHON's environment, so that nothing large is downloaded twice.
set -euo pipefail
python=$1 archive=$(realpath "$2")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-deps "$archive"
# behind the new environment's own packages, and without the editable install of the tree: .pth files there are not read
"$python" -c 'import sys; print(*(path for path in sys.path if "site-packages" in path), sep="\n")' > "$folder/dependencies.pth"
mv "$folder/dependencies.pth" "$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
cd "$folder"
"$folder/venv/bin/python" - "$folder" <<'PROGRAM'
import pathlib
import sys

import torch

import fxcurv
from fxcurv.extensions import BatchGrad

home = pathlib.Path(fxcurv.__file__)
assert home.is_relative_to(sys.argv[1]), home
assert (home.parent / "py.typed").exists()
result = fxcurv.compile(torch.nn.Linear(3, 2), torch.nn.MSELoss(), [BatchGrad()])(torch.randn(4, 3), torch.randn(4, 2))
assert result.grad_batch["weight"].shape == (4, 2, 3)
print("installed and imported: fxcurv", fxcurv.__version__)
PROGRAM

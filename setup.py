"""`pip install .` would put a package `kernels` beside Hugging Face's of the same name, so it is refused."""

raise SystemExit("TeamTR-min is not installed: clone it, pip install -r requirements.txt, python train.py")

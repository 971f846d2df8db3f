# `make lab` opens the lab, `make test` tests it. Either sets it up first, in .venv, where needed.

PYTHON ?= python3
PORT ?= 8888
BROWSER ?= yes
SETUP_MB = 3000

# Jupyter's own files stay in .venv too: the lab works where the home folder cannot be written, and
# nobody's settings change what it does.
export JUPYTER_CONFIG_DIR = $(CURDIR)/.venv/jupyter
export JUPYTER_DATA_DIR = $(CURDIR)/.venv/jupyter
export JUPYTER_RUNTIME_DIR = $(CURDIR)/.venv/jupyter/runtime
export IPYTHONDIR = $(CURDIR)/.venv/ipython

# A .venv that was moved or copied, or whose Python is gone, cannot be mended: it is not ready.
$(shell { [ "$$(cat .venv/ready)" = "$$(pwd -P)" ] && .venv/bin/python -c ""; } 2> /dev/null || rm -f .venv/ready)

.PHONY: help lab test notebooks lint clean

help:
	@echo "make lab        open the lab in JupyterLab (PORT=9000: another port, BROWSER=no: only print the address)"
	@echo "make test       lint, run every test and every notebook, and compare what the notebooks print"
	@echo "make notebooks  run every notebook and store its outputs"
	@echo "make lint       check the style of the code and the notebooks"
	@echo "make clean      remove .venv and all caches"

lab: .venv/ready
	@exec .venv/bin/python -m jupyterlab --ip=127.0.0.1 --port=$(PORT) --log-level=WARN \
		--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb \
		--LanguageServerManager.autodetect=False --LabApp.news_url=None \
		--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
		$(if $(filter no,$(BROWSER)),--no-browser) $$([ "$$(id -u)" != 0 ] || echo --allow-root)

test: lint
	@.venv/bin/python -m pytest

notebooks: .venv/ready
	@.venv/bin/python notebooks/execute.py

lint: .venv/ready
	@.venv/bin/python -m ruff check .

clean:
	rm -rf .venv build *.egg-info labutils/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# The stamp goes first and comes back last, so an interrupted set-up is begun anew; a finished one
# whose lock has changed is brought up to date in place.
.venv/ready: pyproject.toml constraints.txt labutils/kernels.cpp
	@$(require_python)
	@$(require_disk)
	@[ -f $@ ] || { echo "Setting up .venv, once: two or three minutes, longer where CUDA comes along."; \
		"$(PYTHON)" -m venv --clear .venv; }
	@rm -f $@ labutils/_kernels*.so
	@.venv/bin/python -m pip --disable-pip-version-check install --constraint constraints.txt --editable ".[test]"
	@ls labutils/_kernels*.so > /dev/null 2>&1 || echo "There is no C++ compiler: 4 bits will run slowly on this" \
		"processor. To mend it: \`sudo apt-get install g++\` or the like, then \`make clean lab\`."
	@mkdir -p .venv/share/jupyter/lab/settings
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' \
		> .venv/share/jupyter/lab/settings/overrides.json
	@pwd -P > $@

define require_python
version=$$("$(PYTHON)" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2> /dev/null) || version=missing; \
stop() { echo "The lab needs Python 3.11 or newer with its venv module, and here $$1." >&2; exit 1; }; \
case $$version in \
missing) stop "$(PYTHON) does not run: $(install_python)" ;; \
2.* | 3.[0-9].* | 3.10.*) stop "$(PYTHON) is Python $$version: $(install_python)" ;; \
esac; \
"$(PYTHON)" -c "import ensurepip, venv" 2> /dev/null || \
	stop "$(PYTHON) is Python $$version without it: \`sudo apt-get install python$${version%.*}-venv\`"
endef

# Only a first set-up is asked: a later one replaces what is there.
define require_disk
free=$$("$(PYTHON)" -c "import shutil; print(shutil.disk_usage('.').free // 10**6)"); \
[ -f $@ ] || [ $$free -ge $(SETUP_MB) ] || { echo "Setting up takes $(SETUP_MB) MB of disk, and $$free MB are" \
	"free in $(CURDIR): make room, or move the lab to another disk." >&2; exit 1; }
endef
install_python = install one (Debian 12: \`sudo apt-get install python3-venv\`, macOS: \`brew install python\`), \
	or name one that you have (\`make PYTHON=/path/to/python3.12\`)

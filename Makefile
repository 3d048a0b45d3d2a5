# Everything happens in .venv; `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := mistral_fetch runtime tests tools benchmarks

.PHONY: help demo test check fix docs site sbom bench clean

help:  ## List what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[runtime,serve,sign,docs,dev]'
	@touch $@

demo: $(STAMP)  ## Install, then the whole product on loopback in a minute
	$(BIN)/mistral-fetch demo

test: $(STAMP)  ## Run the tests (no network, no GPU, no root needed)
	$(BIN)/python -m pytest -n auto --dist worksteal

check: $(STAMP)  ## Lint, formatting and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

fix: $(STAMP)  ## Repair what lint and formatting can repair
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

docs: $(STAMP)  ## Regenerate the command-line reference and the manual page
	$(BIN)/python tools/generate_cli_reference.py
	$(BIN)/python tools/generate_man_page.py

site: $(STAMP)  ## Build the documentation as a site, into site/; a broken link ends it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

sbom: $(STAMP)  ## Print a software bill of materials of the base program (CycloneDX)
	@$(BIN)/python tools/generate_sbom.py

bench: $(STAMP)  ## Say what each file in benchmarks/ measures, and how to run it
	@for file in $$(grep -l __main__ benchmarks/*.py); do echo "$(BIN)/python $$file"; sed -n '1s/"""/    /gp' $$file; done

clean:  ## Remove everything that was built
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache

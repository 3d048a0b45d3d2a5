"""``completion``: what a shell has to run once so that TAB completes commands, options and models."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from mistral_fetch.cli.options import FrontEnd, command

# Bash splits words at @, : and =, which references are full of. So the line is split at blanks here, and what bash
# takes for the part before the current word is cut off the answers.
_BASH = r"""_mistral_fetch_complete() {
    local line=${COMP_LINE:0:COMP_POINT} IFS=$' \t\n' words last
    read -ra words <<< "$line"
    [[ $line == *[[:blank:]] ]] && words+=("")
    last=${words[${#words[@]}-1]}
    local breaks=${COMP_WORDBREAKS//[^@:=]/} before=""
    [[ -n $breaks ]] && before=${last%"${last##*[$breaks]}"}
    IFS=$'\n'
    COMPREPLY=( $(COMP_WORDS="$line" COMP_CWORD=$((${#words[@]} - 1)) _MISTRAL_FETCH_COMPLETE=complete_bash \
        "$1" 2>/dev/null) )
    COMPREPLY=( "${COMPREPLY[@]#"$before"}" )
}
complete -o default -F _mistral_fetch_complete mistral-fetch
"""
_ZSH = """#compdef mistral-fetch
_mistral_fetch_complete() {
  eval "$(_TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" _MISTRAL_FETCH_COMPLETE=complete_zsh mistral-fetch 2>/dev/null)"
}
if [[ ${funcstack[1]} == _mistral-fetch ]]; then
  _mistral_fetch_complete "$@"
else
  compdef _mistral_fetch_complete mistral-fetch
fi
"""
_FISH_ASK = "env _MISTRAL_FETCH_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION={} \
_TYPER_COMPLETE_ARGS=(commandline -cp) mistral-fetch 2>/dev/null"
_FISH = f"""complete --command mistral-fetch --no-files --arguments "({_FISH_ASK.format("get-args")})" \
--condition "{_FISH_ASK.format("is-args")}"
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


class Shell(str, Enum):
    """The shells that a script is here for."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "completion", epilog="Exit codes: 0 ok, 2 usage.")(completion)


def completion(
    front: FrontEnd, shell: Annotated[Shell, typer.Argument(metavar="bash|zsh|fish", help="The shell to print it for.")]
) -> int:
    """Print what makes TAB complete; for bash add to ~/.bashrc: source <(mistral-fetch completion bash)."""
    script = SCRIPTS[shell.value]
    front.result({"shell": shell.value, "script": script}, script.rstrip("\n"))
    return 0

"""`completion`: the scripts for the shells, and the hidden command they call, which knows the words of fleetctl.

The scripts pass the words before the cursor and the one under it, and get one candidate a line, with its help behind a tab, or
`:files` where file names are meant. So all shells complete the same, and the scripts stay small.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fleetctl.cli.terminal import emit
from fleetctl.errors import UsageError

FILES = ":files"

BASH = r"""# bash completion for fleetctl; put it into /etc/bash_completion.d, or: source <(fleetctl completion bash)
_fleetctl() {
    local IFS=$'\n' line current="${COMP_WORDS[COMP_CWORD]}"
    COMPREPLY=()
    while read -r line; do
        if [[ $line == :files ]]; then
            compopt -o default
            return
        fi
        COMPREPLY+=("${line%%$'\t'*}")
    done < <("$1" __complete --current="$current" -- "${COMP_WORDS[@]:1:COMP_CWORD-1}" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]]; then
        compopt -o nospace
    fi
}
complete -F _fleetctl fleetctl
"""

ZSH = r"""#compdef fleetctl
# zsh completion for fleetctl; put it into a folder of $fpath as _fleetctl, or: source <(fleetctl completion zsh)
_fleetctl() {
    local line value
    local -a found open
    for line in "${(@f)$(${words[1]} __complete --current="${(Q)words[CURRENT]}" -- "${(@Q)words[2,CURRENT-1]}" 2>/dev/null)}"; do
        if [[ $line == :files ]]; then
            _files
            return
        fi
        value=${line%%$'\t'*}
        if [[ -z $value ]]; then
            continue
        elif [[ $value == *= ]]; then
            open+=("$value")
        else
            found+=("${value//:/\\:}:${line#*$'\t'}")
        fi
    done
    (( $#open )) && compadd -S '' -a open
    (( $#found )) && _describe -V fleetctl found
}
if [[ ${funcstack[1]} == _fleetctl ]]; then
    _fleetctl "$@"
else
    compdef _fleetctl fleetctl
fi
"""

FISH = r"""# fish completion for fleetctl; put it into ~/.config/fish/completions/fleetctl.fish, or: fleetctl completion fish | source
function __fleetctl_complete
    set -l before (commandline -opc)
    set -l current (commandline -ct)
    set -l found ($before[1] __complete --current="$current" -- $before[2..-1] 2>/dev/null)
    if test "$found[1]" = :files
        __fish_complete_path "$current"
    else
        string join -- \n $found
    end
end
complete --command fleetctl --no-files --arguments '(__fleetctl_complete)'
"""

POWERSHELL = r"""# PowerShell completion for fleetctl; in $PROFILE: fleetctl completion powershell | Out-String | Invoke-Expression
Register-ArgumentCompleter -Native -CommandName fleetctl -ScriptBlock {
    param($wordToComplete, $commandAst, $cursorPosition)
    $before = @($commandAst.CommandElements | Select-Object -Skip 1 |
        Where-Object { $_.Extent.EndOffset -lt $cursorPosition } | ForEach-Object { $_.ToString() })
    $program = $commandAst.CommandElements[0].ToString()
    & $program __complete "--current=$wordToComplete" -- @before 2>$null | ForEach-Object {
        $value, $help = $_ -split "`t", 2
        if ($value -ne ':files') {
            if (-not $help) { $help = $value }
            [System.Management.Automation.CompletionResult]::new($value, $value, 'ParameterValue', $help)
        }
    }
}
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH, "powershell": POWERSHELL}
FILE_NAMES = {"bash": "fleetctl.bash", "zsh": "_fleetctl", "fish": "fleetctl.fish", "powershell": "fleetctl.ps1"}


def completion(shell: Annotated[str, typer.Argument(metavar="SHELL", help=" | ".join(SCRIPTS))]) -> None:
    """Print the completion script for a shell: bash, zsh, fish or powershell.

    \b
    Examples:
      source <(fleetctl completion bash)
      fleetctl completion zsh > ~/.zfunc/_fleetctl
      fleetctl completion fish | source
    """
    script = SCRIPTS.get({"pwsh": "powershell"}.get(shell, shell))
    if script is None:
        raise UsageError(f"no completion for {shell!r}", hint=f"one of {', '.join(SCRIPTS)}")
    emit(script)


def complete(
    ctx: typer.Context,
    before: Annotated[list[str] | None, typer.Argument()] = None,
    current: Annotated[str, typer.Option("--current")] = "",
    state_dir: Annotated[str | None, typer.Option("--state-dir", hidden=True)] = None,
) -> None:
    """Candidates for the word under the cursor, for the completion scripts. Never fails loudly, never starts anything.

    \b
    Example:
      fleetctl __complete --current=sc --
    """
    # bash cuts words at "="; FLEET=N and --option=value are then three words, and their halves are whole words to us.
    words, word = [part for part in before or [] if part != "="], "" if current == "=" else current
    found = candidates(ctx.find_root().command, words, word, state_dir or ctx.find_root().params.get("state_dir"))
    emit("".join(f"{value}\t{help}".rstrip() + "\n" for value, help in found))


def candidates(root: Any, words: Sequence[str], word: str, state_dir: str | None = None) -> list[tuple[str, str]]:
    """What may stand in the place of `word` behind `words`, each with its help. Any: typer's commands have no public type."""
    command, context, option, state_dir = _walk(root, words, state_dir)
    if command is None or "--" in words:
        return [(FILES, "")]  # the agent's own command line
    if option is None and word.startswith("--") and "=" in word:
        name, _, value = word.partition("=")
        option = _option(command, context, name)
        return [
            (found if found == FILES else f"{name}={found}", help)
            for found, help in _values(option.metavar if option else "", value, state_dir)
        ]
    if option is not None:
        return _values(option.metavar, word, state_dir)
    if word.startswith("-"):
        return _options(command, context, word)
    if hasattr(command, "list_commands"):
        names = [name for name in command.list_commands(context) if name.startswith(word) and not name.startswith("_")]
        return [(name, command.get_command(context, name).get_short_help_str(limit=70)) for name in names]
    argument = next((param for param in command.get_params(context) if param.param_type_name == "argument"), None)
    return _values(argument.metavar if argument else "", word, state_dir)


def _walk(root: Any, words: Sequence[str], state_dir: str | None) -> tuple[Any, Any, Any, str | None]:
    """The command that the words lead to, its context, and the option whose value comes next; the state directory they choose."""
    command, context, option = root, typer.Context(root, info_name="fleetctl"), None
    for word in words:
        if option is not None:
            state_dir = word if "--state-dir" in option.opts else state_dir
            option = None
        elif word.startswith("-"):
            name, equals, value = word.partition("=")
            found = _option(command, context, name)
            if found is not None and not found.is_flag:
                option = None if equals else found
                state_dir = value if equals and "--state-dir" in found.opts else state_dir
        elif hasattr(command, "list_commands"):
            if word not in command.list_commands(context):
                return None, context, None, state_dir
            command = command.get_command(context, word)
            context = typer.Context(command, info_name=word, parent=context)
    return command, context, option, state_dir


def _option(command: Any, context: Any, name: str) -> Any:
    return next((param for param in command.get_params(context) if param.param_type_name == "option" and name in param.opts), None)


def _options(command: Any, context: Any, word: str) -> list[tuple[str, str]]:
    return [
        (name, " ".join((param.help or "").split()))
        for param in command.get_params(context)
        if param.param_type_name == "option" and not param.hidden
        for name in sorted(param.opts, key=len, reverse=True)
        if name.startswith(word) and (name.startswith("--") or word == name)
    ]


def _values(metavar: str | None, word: str, state_dir: str | None) -> list[tuple[str, str]]:
    """Candidates for a value, told by what its place is called in the help."""
    kind = (metavar or "").strip("[].").removesuffix("...")
    if kind == "SHELL":
        values = [(shell, "") for shell in SCRIPTS]
    elif kind == "ready|count=N|drained":
        values = [("ready", "every agent is ready"), ("count=", "so many agents are ready"), ("drained", "no agent is left")]
    elif "|" in kind and kind == kind.lower():
        values = [(choice, "") for choice in kind.split("|")]
    elif kind in ("FILE", "DIR"):
        return [(FILES, "")]
    elif kind == "CHECKPOINT":
        values = _checkpoints(state_dir)
    elif "FLEET" in kind or "AGENT" in kind:
        values = _names(kind, state_dir)
    else:
        values = []
    return [(value, help) for value, help in values if value.startswith(word)]


def _checkpoints(state_dir: str | None) -> list[tuple[str, str]]:
    """The newest first: from the names of the folders alone, so that it is quick and never fails."""
    from fleetctl.engines.local import LocalEngine

    return [(one, f"of {agent}") for one, agent in reversed(LocalEngine(state_dir).checkpoint_ids())]


def _names(kind: str, state_dir: str | None) -> list[tuple[str, str]]:
    """Fleets and agents: from the daemon if it answers at once, else from the names in the state directory."""
    from fleetctl.client import Client
    from fleetctl.engines.local import LocalEngine
    from fleetctl.errors import FleetctlError

    engine = LocalEngine(state_dir)
    try:
        with Client(engine.paths.root, timeout=0.5) as client:
            status = client.status()
        fleets = [(fleet["name"], f"{fleet['ready_replicas']} of {fleet['desired_replicas']} ready") for fleet in status["fleets"]]
        agents = [(agent["id"], agent["state"]) for fleet in status["fleets"] for agent in fleet["agents"]]
    except (FleetctlError, OSError):
        known = engine.known_names()
        fleets, agents = [(name, "fleet") for name in known[0]], [(name, "agent") for name in known[1]]
    if kind.startswith("N|"):
        return [(f"{name}=", help) for name, help in fleets]
    return ("FLEET" in kind) * fleets + ("AGENT" in kind) * agents

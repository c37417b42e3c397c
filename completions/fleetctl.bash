# bash completion for fleetctl; put it into /etc/bash_completion.d, or: source <(fleetctl completion bash)
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

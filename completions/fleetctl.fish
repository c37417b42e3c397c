# fish completion for fleetctl; put it into ~/.config/fish/completions/fleetctl.fish, or: fleetctl completion fish | source
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

# PowerShell completion for fleetctl; in $PROFILE: fleetctl completion powershell | Out-String | Invoke-Expression
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

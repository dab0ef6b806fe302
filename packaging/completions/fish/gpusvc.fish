# gpusvc itself answers, so that the names of models complete.
set --local ask 'env _GPUSVC_COMPLETE=complete_fish _TYPER_COMPLETE_ARGS=(commandline -cp)'
complete --command gpusvc --no-files \
    --arguments "($ask _TYPER_COMPLETE_FISH_ACTION=get-args gpusvc)" \
    --condition "$ask _TYPER_COMPLETE_FISH_ACTION=is-args gpusvc"
# What these take are files.
complete --command gpusvc --force-files --condition '__fish_seen_subcommand_from add check import'

"""Running experiments: runs, plots, reports and the `ai-sleep` command."""

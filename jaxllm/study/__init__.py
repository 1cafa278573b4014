"""What every experiment shares: flags and exit codes, resumable cells, progress, results, report and plots.

Nothing here imports jax, flax or matplotlib when it is imported, so that a script answers `--help` or a bad
flag in a fraction of a second. A script is its docstring, its flags, a `check` and a `main`:

    def main(flags):
      with files.Lock(flags.out), StopFlag() as stop, Progress() as progress:
        ledger = cells.Ledger(f"{flags.out}/cells.jsonl", cells.check_config(flags.out, config))
        failures = cells.run_groups(groups, ledger, compute, on_done, stop)
        files.write_results(flags.out, [row for group in groups for row in ledger.done[group.name]])
      return 1 if failures else 0

    if __name__ == "__main__":
      run_app(main, check)
"""

from jaxllm.study.app import run_app

__all__ = ["run_app"]

"""Code of the scripts that is independent of the method.

cli          options, InputError, exit codes, the device
files        atomic writing of result files, a lock on a folder
checkpoint   saving and loading of weights and training states
digest       digests of files, values and state dicts
provenance   config.json: what the content of a folder was made from
distributed  several processes, as torchrun starts them
parallel     worker processes and threads
progress     progress bars, and lines in log files
lazy         deferred imports of large packages
"""

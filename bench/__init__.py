"""Speed and memory against the published algorithm: `pytest bench/`, or `make bench`.

pytest bench/ --save                                   write bench/results/<device>/<date>.json
pytest bench/ --slow                                   also 16 x 124 tokens, where the published loops take minutes
pytest bench/ --threads 2                              other than one thread
pytest bench/ -k wordnet                               some of it
pytest bench/ --benchmark-timer time.process_time      CPU time, for a machine that others use too
pytest bench/ --benchmark-disable -m smoke             seconds: does it all still run?
python -m bench.report RESULT.json --update README.md  the tables of a saved run, into a page
"""

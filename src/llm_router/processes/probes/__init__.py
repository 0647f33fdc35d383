"""The health checks that touch something: models, caches, the database, backends, services of others.

Each is an async function without arguments that returns an `observe.health.checks.Check`; standard.py puts them
together for control. None of it counts as traffic: no metrics but `health_check_*`, no keys, no limits, no cached answers.
Not for: when checks run and what they mean together (observe/health).
"""

"""The classes of the monitoring examples, for programs that are not our gateway: thin faces over `observe` and `app`.

Get them from `llm_router`: `from llm_router import MonitoringSystem`. Not for: the processes of `llm-router serve`.
"""

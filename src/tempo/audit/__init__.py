"""The audit: what a scheme leaks to a worker that records everything, measured by attacks.

    transcript (what workers saw) -> attacks, by what the attacker knows -> figures -> report

`attack` states the contract of an attack; `attacks/` holds one small file for each, and its registry; `solvers/` what
they put to use, `controls/` what they must break before they count, `report/` what comes of it. Attacks never see the
truth: it is handed to their scoring only.
"""

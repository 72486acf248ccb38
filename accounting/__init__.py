"""The record of money: usage events become ledger transfers, rollups and audits.

`accounting.contract` holds what proxy, accounting and admin API must agree on;
everything else here belongs to accounting alone.
"""

-- Usage set right afterwards, credits taken back and restored, and what audits have proved.

-- `charge_ucr` of a usage row is what the exchange costs now; less `revised_ucr` it is what was
-- posted first, with the row's own journal and burns. `revision` is the stream's.
alter table usage_records add column revised_ucr bigint not null default 0;

-- Each change of a charge: the difference alone, with its own journal. A difference is what the
-- exchange costs more (above zero) or less.
create table usage_revisions (
    id bigint generated always as identity primary key,
    day date not null,
    request_id text not null,
    workspace_id text not null references workspaces,
    revision smallint,          -- the stream's; null: an operator's
    difference_ucr bigint not null,
    burns jsonb not null,       -- [[grant id, µcr], …] in order; below zero: given back
    journal_id bigint references journals,  -- null when the difference is nothing
    source_ref text not null unique,
    reason text not null default '',
    recorded_at timestamptz not null default now()
);
create index usage_revisions_of_request on usage_revisions (day, request_id);
create index usage_revisions_of_journal on usage_revisions (journal_id);

-- A delta may also change what a key counts as spent.
alter table redis_deltas add column key_id text,
    add column spent_ucr bigint not null default 0,
    add check (spent_ucr = 0 or key_id is not null);

alter table journals drop constraint journals_kind_check,
    add constraint journals_kind_check check (kind in (
        'usage', 'trial', 'promo', 'rollover', 'plan', 'topup', 'expiry', 'restore',
        'reversal', 'refund', 'dispute', 'clawback'
    ));

-- 14: a repayment undone, because what it repaid is charged no more
alter table transfers drop constraint transfers_code_check,
    add constraint transfers_code_check
        check (code in (1, 2, 10, 11, 12, 13, 14, 20, 21, 30, 31));

-- What audits read that look only at what is new; both columns grow with the table.
create index journals_by_time on journals using brin (posted_at) with (pages_per_range = 16);
create index usage_by_time on usage_records using brin (recorded_at) with (pages_per_range = 16);

-- Up to when the ledger has been proved, and every account's totals at that instant.
create table audit_mark (
    only_one boolean primary key default true check (only_one),
    proved_until timestamptz not null,
    audited_at timestamptz not null default now()
);
create table audit_totals (
    account_id bigint primary key references ledger_accounts,
    debits_ucr bigint not null,
    credits_ucr bigint not null
);

-- Credits taken back from a grant: asked for first, so that a request broken off is finished.
create table withdrawals (
    id text primary key,
    workspace_id text not null references workspaces,
    grant_id text not null references grants,
    kind text not null check (kind in ('refund', 'clawback')),
    wanted_ucr bigint not null check (wanted_ucr > 0),
    reason text not null default '',
    state text not null default 'open' check (state in ('open', 'done', 'refused')),
    taken_ucr bigint not null default 0 check (taken_ucr between 0 and wanted_ucr),
    journal_id bigint references journals,
    created_at timestamptz not null default now()
);
create index withdrawals_open on withdrawals (created_at) where state = 'open';

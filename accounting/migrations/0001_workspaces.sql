-- Workspaces, their keys, and what was asked for under an idempotency key.
--
-- Postgres is the authority for all three; Redis holds what admission needs of the first two,
-- published from these rows (accounting/workspaces.py, accounting/keys.py). The numbers of
-- states are those of accounting/contract/keyspace.py.

create table workspaces (
  id text primary key check (id ~ '^ws_[0-9A-HJKMNP-TV-Z]{26}$'),
  name text not null check (length(name) between 1 and 128),
  email text check (length(email) between 3 and 254),
  kind text not null default 'organization',
  tier text not null default 'standard',
  state smallint not null default 1 check (state in (1, 2)), -- 1 active, 2 suspended
  created_at timestamptz not null default now()
);

-- A key's limits: 0 = unlimited, but a cost cap of null = none. Empty arrays = all.
-- The secret itself is nowhere: `digest` is the SHA-256 of it, in hex.
create table api_keys (
  id text primary key check (id ~ '^key_[0-9A-HJKMNP-TV-Z]{26}$'),
  workspace_id text not null references workspaces,
  name text not null check (length(name) between 1 and 128),
  digest text not null unique check (digest ~ '^[0-9a-f]{64}$'),
  version bigint not null default 1 check (version >= 1), -- rises by one at each change
  state smallint not null default 1 check (state in (1, 2)), -- 1 live, 2 revoked
  scopes text[] not null default '{}',
  allowed_models text[] not null default '{}',
  expires_at timestamptz,
  requests_per_minute bigint not null default 0 check (requests_per_minute >= 0),
  tokens_per_minute bigint not null default 0 check (tokens_per_minute >= 0),
  tokens_per_day bigint not null default 0 check (tokens_per_day >= 0),
  concurrency bigint not null default 0 check (concurrency >= 0),
  cost_cap_ucr bigint check (cost_cap_ucr between 0 and 9000000000000000),
  created_at timestamptz not null default now(),
  revoked_at timestamptz,
  check ((state = 2) = (revoked_at is not null))
);
create index api_keys_of_workspace on api_keys (workspace_id, created_at, id);

-- One row per (who, route, idempotency key). `resource_id` is chosen with the claim, so that
-- whoever carries the request out, and however often, makes the same resource.
-- `seed` is half of what a new secret is derived from, the caller's bearer token the other;
-- it is wiped after a day. `kept` rows are for money and stay for good.
create table idempotency (
  scope text not null,
  route text not null,
  key text not null check (length(key) between 1 and 255),
  request_hash bytea not null,
  resource_id text not null,
  seed bytea,
  kept boolean not null,
  state smallint not null default 1 check (state in (1, 2, 3)), -- 1 in progress, 2 broken off, 3 done
  attempts integer not null default 1 check (attempts >= 1),
  claimed_at timestamptz not null default now(),
  created_at timestamptz not null default now(),
  primary key (scope, route, key)
);
create index idempotency_forgotten on idempotency (created_at) where seed is not null or not kept;

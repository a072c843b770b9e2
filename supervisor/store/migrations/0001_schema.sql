-- oldest: 1
-- The tables. No foreign keys: each would lock and write a cold row for every hot one; the functions that delete a job
-- delete all its rows. A live job is in exactly one of waiting, ready and lease, and its counters travel with the row, so
-- that neither a claim nor a completion touches the cold job row. A job that ended is in finished.

-- The one clock for what is expired or due. Tests replace this function to move time.
CREATE FUNCTION bsup.clock() RETURNS timestamptz
LANGUAGE sql VOLATILE PARALLEL SAFE
AS $$ SELECT pg_catalog.clock_timestamp() $$;

-- Defaults of a job type, used where a spec says nothing.
CREATE TABLE bsup.kind (
    name        text PRIMARY KEY,
    attempts    smallint NOT NULL DEFAULT 1 CHECK (attempts BETWEEN 1 AND 1000),
    loss_budget smallint NOT NULL DEFAULT 5 CHECK (loss_budget >= 0),
    priority    smallint NOT NULL DEFAULT 127 CHECK (priority BETWEEN 0 AND 255)
);
INSERT INTO bsup.kind (name) VALUES ('steps');

-- Interned pairs of a kind and the labels asked for. Ids become visible in order (see bsup.intern_need), so that a host
-- that knows all up to an id asks only for those after it.
CREATE TABLE bsup.need (
    id     integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind   text NOT NULL REFERENCES bsup.kind,
    labels text[] NOT NULL,
    UNIQUE (kind, labels)
);

CREATE TABLE bsup.job (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    need_id      integer NOT NULL,
    priority     smallint NOT NULL,
    attempts     smallint NOT NULL,
    loss_budget  smallint NOT NULL,
    steps_total  smallint NOT NULL,
    has_secrets  boolean NOT NULL,
    cpu          real NOT NULL,
    memory       bigint NOT NULL,
    submitted_at timestamptz NOT NULL,
    name         text NOT NULL,
    submitter    text NOT NULL,
    spec         jsonb NOT NULL
);

-- Jobs that wait for parents (parents_left > 0) or for a time (run_at). parents_left is in no index: counting down is HOT.
CREATE TABLE bsup.waiting (
    job_id       bigint PRIMARY KEY,
    run_at       timestamptz,
    need_id      integer NOT NULL,
    parents_left integer NOT NULL DEFAULT 0,
    priority     smallint NOT NULL,
    loss_budget  smallint NOT NULL,
    cpu          real NOT NULL,
    memory       bigint NOT NULL,
    generation   integer NOT NULL,
    revision     integer NOT NULL,
    attempt      integer NOT NULL,
    failures     integer NOT NULL,
    losses       integer NOT NULL,
    releases     integer NOT NULL
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
        autovacuum_analyze_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX waiting_due ON bsup.waiting (run_at) WHERE run_at IS NOT NULL;

-- What can be claimed. Rows are inserted and deleted, never updated.
CREATE TABLE bsup.ready (
    job_id      bigint PRIMARY KEY,
    ready_at    timestamptz NOT NULL,
    memory      bigint NOT NULL,
    need_id     integer NOT NULL,
    cpu         real NOT NULL,
    generation  integer NOT NULL,
    revision    integer NOT NULL,
    attempt     integer NOT NULL,
    failures    integer NOT NULL,
    losses      integer NOT NULL,
    releases    integer NOT NULL,
    priority    smallint NOT NULL,
    loss_budget smallint NOT NULL,
    alone       boolean NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_insert_scale_factor = 0.1, autovacuum_analyze_scale_factor = 0.05,
        autovacuum_vacuum_cost_delay = 0);
CREATE INDEX ready_claim ON bsup.ready (need_id, priority DESC, job_id);

-- Jobs that run. The stop_ columns are in no index: asking for a stop is a HOT update.
CREATE TABLE bsup.lease (
    session     uuid NOT NULL,
    counter     bigint NOT NULL,
    job_id      bigint NOT NULL UNIQUE,
    leased_at   timestamptz NOT NULL,
    ready_at    timestamptz NOT NULL,
    memory      bigint NOT NULL,
    need_id     integer NOT NULL,
    cpu         real NOT NULL,
    generation  integer NOT NULL,
    revision    integer NOT NULL,
    attempt     integer NOT NULL,
    failures    integer NOT NULL,
    losses      integer NOT NULL,
    releases    integer NOT NULL,
    priority    smallint NOT NULL,
    loss_budget smallint NOT NULL,
    alone       boolean NOT NULL,
    stop_kill   boolean NOT NULL DEFAULT false,
    stop_grace  double precision,
    stop_at     timestamptz,
    stop_by     text,
    PRIMARY KEY (session, counter)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
        autovacuum_analyze_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);

-- How each generation of a job ended. A row never changes, but for retried_at: when a retry opened the next generation.
-- ended_at is when its work ended, by its host's clock; recorded_at, by the database's, is what retention goes by.
CREATE TABLE bsup.finished (
    job_id     bigint NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT bsup.clock(),
    ended_at   timestamptz NOT NULL,
    started_at timestamptz,
    session    uuid,
    counter    bigint,
    generation integer NOT NULL,
    need_id    integer NOT NULL,
    revision   integer NOT NULL,
    attempt    integer NOT NULL,
    failures   integer NOT NULL,
    losses     integer NOT NULL,
    releases   integer NOT NULL,
    exit_code  smallint,
    signal     smallint,
    state      text NOT NULL CHECK (state IN ('succeeded', 'failed', 'canceled')),
    host       text,
    reason     text,
    error      text,
    retried_at timestamptz,
    PRIMARY KEY (job_id, generation)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.1);
CREATE INDEX finished_recorded ON bsup.finished (recorded_at);
-- Few jobs end otherwise than succeeded; this keeps listing them off a walk through all that did.
CREATE INDEX finished_otherwise ON bsup.finished (job_id) WHERE state <> 'succeeded';

-- Attempts that ended. became: the job's state that followed, for a repeat of the same completion.
CREATE TABLE bsup.attempt (
    job_id     bigint NOT NULL,
    attempt    integer NOT NULL,
    generation integer NOT NULL,
    session    uuid NOT NULL,
    counter    bigint NOT NULL,
    leased_at  timestamptz NOT NULL,
    started_at timestamptz,
    ended_at   timestamptz NOT NULL,
    exit_code  smallint,
    signal     smallint,
    outcome    text NOT NULL
               CHECK (outcome IN ('succeeded', 'failed', 'canceled', 'released', 'lost', 'superseded')),
    became     text NOT NULL,
    host       text NOT NULL,
    reason     text,
    error      text,
    PRIMARY KEY (job_id, attempt)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.1);

CREATE TABLE bsup.step (
    job_id     bigint NOT NULL,
    attempt    integer NOT NULL,
    idx        smallint NOT NULL,
    exit_code  smallint,
    signal     smallint,
    started_at timestamptz,
    ended_at   timestamptz,
    state      text NOT NULL
               CHECK (state IN ('pending', 'running', 'succeeded', 'failed', 'canceled', 'skipped', 'unknown')),
    name       text NOT NULL,
    error      text,
    PRIMARY KEY (job_id, attempt, idx)
) WITH (fillfactor = 80);

-- How long an attempt's stored log is: the offset at which its next chunk must begin.
CREATE TABLE bsup.log (
    job_id  bigint NOT NULL,
    attempt integer NOT NULL,
    size    bigint NOT NULL,
    PRIMARY KEY (job_id, attempt)
) WITH (fillfactor = 70);

CREATE TABLE bsup.log_chunk (
    job_id  bigint NOT NULL,
    attempt integer NOT NULL,
    length  bigint NOT NULL CHECK (length > 0),
    offset_ bigint NOT NULL,
    data    bytea NOT NULL,
    PRIMARY KEY (job_id, attempt, offset_)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.1);
-- The data is compressed already.
ALTER TABLE bsup.log_chunk ALTER COLUMN data SET STORAGE EXTERNAL;

-- done: the parent succeeded once since; a later generation of the parent does not count again.
CREATE TABLE bsup.edge (
    parent bigint NOT NULL,
    child  bigint NOT NULL,
    done   boolean NOT NULL,
    PRIMARY KEY (parent, child)
) WITH (fillfactor = 80);
CREATE INDEX edge_child ON bsup.edge (child);

-- Secret values of live jobs. With a name: an environment variable of every step; without: a value to redact. No grant to
-- submitters or readers; deleted in the transaction that ends the job.
CREATE TABLE bsup.job_secret (
    job_id      bigint NOT NULL,
    name        text,
    value       text NOT NULL,
    replacement text,
    CHECK ((name IS NULL) <> (replacement IS NULL))
);
CREATE INDEX job_secret_job ON bsup.job_secret (job_id);

CREATE TABLE bsup.submission_key (
    key    text PRIMARY KEY,
    job_id bigint NOT NULL,
    digest bytea NOT NULL
);
CREATE INDEX submission_key_job ON bsup.submission_key (job_id);

-- One row a host, renewed every few seconds: no index on what a renewal writes, room for HOT updates. Logged: an unlogged
-- table is empty after a crash, and every job would look orphaned. dead_at: a reaper has begun to take its leases.
CREATE TABLE bsup.session (
    id          uuid PRIMARY KEY,
    incarnation uuid NOT NULL,
    epoch       integer NOT NULL,
    host        text NOT NULL,
    labels      text[] NOT NULL,
    slots       integer NOT NULL,
    cpu         double precision,
    memory      bigint,
    version     text NOT NULL,
    machine_id  text NOT NULL,
    boot_id     text NOT NULL,
    pid         integer NOT NULL,
    term        double precision NOT NULL CHECK (term > 0),
    started_at  timestamptz NOT NULL,
    renewed_at  timestamptz NOT NULL,
    expires_at  timestamptz NOT NULL,
    idle        boolean NOT NULL DEFAULT false,
    draining    boolean NOT NULL DEFAULT false,
    dead_at     timestamptz
) WITH (fillfactor = 30, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

-- The database's own sign of life, so that an outage, a failover or a step of the clock expires nobody.
CREATE TABLE bsup.pulse (
    one             boolean PRIMARY KEY DEFAULT true CHECK (one),
    at              timestamptz,
    timeline        text,
    reap_not_before timestamptz
) WITH (fillfactor = 10, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);
INSERT INTO bsup.pulse DEFAULT VALUES;

-- Rare things that happened between a submission and its end. xid: see the statement that reads them.
CREATE TABLE bsup.event (
    id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at     timestamptz NOT NULL DEFAULT bsup.clock(),
    xid    xid8 NOT NULL DEFAULT pg_catalog.pg_current_xact_id(),
    job_id bigint,
    type   text NOT NULL,
    detail jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX event_job ON bsup.event (job_id);

-- Every job with its state, which is where its row is. Each branch is a single table without a WHERE of its own: only so
-- does a join or a filter by id reach the primary keys. Filter by id, or page by it.
CREATE VIEW bsup.jobs AS
SELECT j.id, j.name, n.kind, s.state, s.revision, s.generation, j.priority, n.labels, s.attempt, j.attempts,
       s.failures, s.losses, s.releases, j.submitted_at, j.submitter, s.ready_at, s.run_at, s.started_at, s.ended_at,
       coalesce(s.host, h.host) AS host, s.session, s.counter, s.exit_code, s.signal, s.error, s.reason, s.stop_asked_at,
       s.parents_left, p.idx AS step, p.name AS step_name, j.steps_total
FROM bsup.job j
JOIN bsup.need n ON n.id = j.need_id
JOIN (
    SELECT w.job_id, 'waiting'::text AS state, w.revision, w.generation, w.attempt, w.failures, w.losses, w.releases,
           NULL::timestamptz AS ready_at, w.run_at, NULL::timestamptz AS started_at, NULL::timestamptz AS ended_at,
           NULL::text AS host, NULL::uuid AS session, NULL::bigint AS counter, NULL::smallint AS exit_code,
           NULL::smallint AS signal, NULL::text AS error, NULL::text AS reason, NULL::timestamptz AS stop_asked_at,
           w.parents_left, NULL::timestamptz AS retried_at
    FROM bsup.waiting w
    UNION ALL
    SELECT r.job_id, 'ready', r.revision, r.generation, r.attempt, r.failures, r.losses, r.releases,
           r.ready_at, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, NULL
    FROM bsup.ready r
    UNION ALL
    SELECT l.job_id, 'running', l.revision, l.generation, l.attempt, l.failures, l.losses, l.releases,
           l.ready_at, NULL, l.leased_at, NULL, NULL, l.session, l.counter, NULL, NULL, NULL, NULL, l.stop_at, 0, NULL
    FROM bsup.lease l
    UNION ALL
    SELECT f.job_id, f.state, f.revision, f.generation, f.attempt, f.failures, f.losses, f.releases,
           NULL, NULL, f.started_at, f.ended_at, f.host, f.session, f.counter, f.exit_code, f.signal, f.error, f.reason,
           NULL, 0, f.retried_at
    FROM bsup.finished f
) s ON s.job_id = j.id
LEFT JOIN bsup.session h ON h.id = s.session AND s.state = 'running'
LEFT JOIN LATERAL (
    SELECT t.idx, t.name FROM bsup.step t
    WHERE s.state = 'running' AND t.job_id = s.job_id AND t.attempt = s.attempt AND t.state = 'running'
    ORDER BY t.idx DESC LIMIT 1
) p ON true
WHERE s.retried_at IS NULL;

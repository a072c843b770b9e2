-- name: examine_server
-- What `bsup doctor` tells of one server: its role, its clock, what is set, whether bsup's schema is there.
SELECT current_setting('server_version') AS version,
       current_setting('server_version_num')::int AS version_number,
       pg_catalog.pg_is_in_recovery() AS in_recovery,
       clock_timestamp() AS now,
       current_user AS me,
       current_database() AS database,
       current_setting('synchronous_standby_names') AS synchronous_names,
       current_setting('synchronous_commit') AS synchronous_commit,
       current_setting('max_connections')::int AS max_connections,
       (SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE backend_type = 'client backend')::int AS connections,
       to_regclass('bsup.migration') IS NOT NULL AS migrated,
       has_database_privilege(current_user, current_database(), 'CREATE') AS may_migrate;

-- name: examine_standbys
-- The replicas that stream from this server, and how far behind they are.
SELECT coalesce(nullif(application_name, ''), host(client_addr), 'standby') AS name,
       coalesce(state, 'unknown') AS state,
       coalesce(sync_state, 'unknown') AS sync_state,
       coalesce(extract(epoch FROM replay_lag), 0)::float8 AS lag
FROM pg_catalog.pg_stat_replication
ORDER BY 1;

-- name: examine_roles
-- Which of bsup's roles there are, and whether this user has their rights.
SELECT r.rolname::text AS name, pg_has_role(current_user, r.oid, 'USAGE') AS mine
FROM pg_catalog.pg_roles r
WHERE r.rolname = ANY ($1::text[]);

-- name: examine_grants
-- Whether this user may do with the hot tables what a daemon does.
SELECT coalesce(bool_and(has_table_privilege(current_user, c.oid, 'SELECT')), false) AS reads,
       coalesce(bool_and(has_table_privilege(current_user, c.oid, 'INSERT')
                         AND has_table_privilege(current_user, c.oid, 'UPDATE')
                         AND has_table_privilege(current_user, c.oid, 'DELETE')), false) AS writes
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = 'bsup' AND c.relname IN ('session', 'lease', 'ready');

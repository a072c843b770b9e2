-- oldest: 7
-- Roles of the cluster, made where the migrator may make them; where not, an administrator makes them (docs say how) and
-- runs the grants. bsup_submitter may submit and cancel; bsup_reader may read all but secrets; bsup_host is for daemons.
DO $$
DECLARE
    v_role text;
BEGIN
    FOREACH v_role IN ARRAY ARRAY['bsup_submitter', 'bsup_host', 'bsup_reader'] LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.rolname = v_role) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', v_role);
            EXCEPTION WHEN insufficient_privilege OR duplicate_object OR unique_violation THEN
                -- Another database's migration of this cluster was faster, or we may not.
                NULL;
            END;
        END IF;
    END LOOP;
END $$;

REVOKE ALL ON SCHEMA bsup FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA bsup FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA bsup FROM PUBLIC;

-- Grants what each role may, on what there is now; a migration that adds tables or functions calls it again.
CREATE FUNCTION bsup.grant_roles() RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.rolname = 'bsup_submitter') THEN
        GRANT USAGE ON SCHEMA bsup TO bsup_submitter;
        GRANT EXECUTE ON FUNCTION bsup.submit(jsonb, text, bigint[]), bsup.cancel(bigint, interval, boolean)
            TO bsup_submitter;
    END IF;
    IF EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.rolname = 'bsup_reader') THEN
        GRANT USAGE ON SCHEMA bsup TO bsup_reader;
        GRANT SELECT ON bsup.jobs, bsup.job, bsup.need, bsup.kind, bsup.waiting, bsup.ready, bsup.lease, bsup.finished,
            bsup.attempt, bsup.step, bsup.log, bsup.log_chunk, bsup.edge, bsup.event, bsup.pulse, bsup.migration
            TO bsup_reader;
        -- Not the incarnation: it is what a holder shows to write.
        GRANT SELECT (id, epoch, host, labels, slots, cpu, memory, version, term, started_at, renewed_at, expires_at, idle,
            draining, dead_at) ON bsup.session TO bsup_reader;
    END IF;
    IF EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.rolname = 'bsup_host') THEN
        GRANT USAGE ON SCHEMA bsup TO bsup_host;
        GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA bsup TO bsup_host;
        REVOKE INSERT, UPDATE, DELETE ON bsup.migration FROM bsup_host;
        GRANT USAGE ON ALL SEQUENCES IN SCHEMA bsup TO bsup_host;
        GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA bsup TO bsup_host;
        REVOKE EXECUTE ON FUNCTION bsup.grant_roles() FROM bsup_host;
    END IF;
END $$;
REVOKE ALL ON FUNCTION bsup.grant_roles() FROM PUBLIC;
SELECT bsup.grant_roles();

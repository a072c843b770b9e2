-- name: append_log
-- Appends chunks; see bsup.append_log.
SELECT ord, stored, size FROM bsup.append_log($1, $2, $3, $4, $5, $6, $7) ORDER BY ord;

-- name: log_size
-- Where an attempt's next chunk begins.
SELECT g.size FROM bsup.log g WHERE g.job_id = $1 AND g.attempt = $2;

-- name: read_log
-- The chunks from the one that holds offset $3 on, up to about $4 bytes; and, from the same snapshot, the log's size and
-- whether the attempt, and the job, have ended. No row: no such job.
SELECT coalesce(g.size, 0) AS size, a.outcome IS NOT NULL AS ended, bsup.state_of(j.id) IN ('succeeded', 'failed', 'canceled') AS final, c.offset_, c.length,
       c.data
FROM bsup.job j
LEFT JOIN bsup.attempt a ON a.job_id = j.id AND a.attempt = $2
LEFT JOIN bsup.log g ON g.job_id = j.id AND g.attempt = $2
LEFT JOIN LATERAL (
    SELECT p.offset_, p.length, p.data
    FROM (
        SELECT k.*, sum(k.length) OVER (ORDER BY k.offset_ ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
        FROM (
            SELECT k.offset_, k.length, k.data FROM bsup.log_chunk k
            WHERE k.job_id = $1 AND k.attempt = $2 AND k.offset_ >= coalesce((
                SELECT max(f.offset_) FROM bsup.log_chunk f
                WHERE f.job_id = $1 AND f.attempt = $2 AND f.offset_ <= $3::bigint), 0)
            ORDER BY k.offset_ LIMIT 1000
        ) k
    ) p
    WHERE coalesce(p.before, 0) < $4::bigint AND p.offset_ + p.length > $3::bigint
) c ON true
WHERE j.id = $1
ORDER BY c.offset_;

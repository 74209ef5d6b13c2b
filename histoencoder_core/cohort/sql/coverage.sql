-- What share of the labelled tiles lies in clusters at least so pure, and would by chance.

-- The interval of 95 % comes from drawing slides, since tiles of a slide are not independent; it is
-- NULL where that has not been done for these data.
CREATE MACRO coverage_at(k, purity) AS TABLE
WITH observed AS (
    SELECT
        p.k,
        sum(p.labelled_tiles)::BIGINT AS labelled_tiles,
        coalesce(sum(p.labelled_tiles) FILTER (p.purity >= purity), 0)::BIGINT AS covered_tiles,
        count(*) FILTER (p.purity >= purity) AS clusters
    FROM cluster_purity AS p
    WHERE p.k = k
    GROUP BY p.k
),
drawn AS (
    SELECT
        coalesce(sum(r.labelled_tiles) FILTER (r.purity >= purity), 0) / sum(r.labelled_tiles)
            AS coverage
    FROM purity_replicates AS r
    WHERE r.scheme = 'bootstrap' AND r.k = k
    GROUP BY r.replicate
)
SELECT
    o.labelled_tiles,
    o.covered_tiles,
    o.covered_tiles / nullif(o.labelled_tiles, 0) AS coverage,
    (SELECT quantile_cont(d.coverage, 0.025) FROM drawn AS d) AS low,
    (SELECT quantile_cont(d.coverage, 0.975) FROM drawn AS d) AS high,
    o.clusters
FROM observed AS o;

-- p_value = (1 + #{null >= observed}) / (1 + replicates), so that it is never 0 (Phipson and Smyth,
-- Stat. Appl. Genet. Mol. Biol. 9, 2010). All is NULL where labels have not been permuted for these
-- data.
CREATE MACRO coverage_null(k, purity) AS TABLE
WITH observed AS (
    SELECT c.coverage FROM coverage_at(k, purity) AS c
),
permuted AS (
    SELECT
        r.scheme,
        coalesce(sum(r.labelled_tiles) FILTER (r.purity >= purity), 0) / sum(r.labelled_tiles)
            AS coverage
    FROM purity_replicates AS r
    WHERE r.scheme <> 'bootstrap' AND r.k = k
    GROUP BY r.scheme, r.replicate
)
SELECT
    scheme.name AS scheme,
    any_value(o.coverage) AS observed,
    -- In an order of its own, so that the last digit is always the same.
    avg(n.coverage ORDER BY n.coverage) AS null_mean,
    quantile_cont(n.coverage, 0.025) AS null_low,
    quantile_cont(n.coverage, 0.975) AS null_high,
    (1 + count(*) FILTER (n.coverage >= o.coverage)) / nullif(1 + count(n.coverage), 1) AS p_value,
    count(n.coverage) AS replicates
FROM observed AS o
CROSS JOIN (VALUES ('all'), ('within_slides')) AS scheme (name)
LEFT JOIN permuted AS n ON n.scheme = scheme.name
GROUP BY scheme.name
ORDER BY scheme.name;

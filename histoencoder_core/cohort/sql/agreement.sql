-- How far clusters and labels agree, over labelled tiles: adjusted Rand index (Hubert and Arabie,
-- J. Classification 2, 1985) and mutual information over the mean of both entropies.

CREATE MACRO agreement(k) AS TABLE
WITH cells AS (
    SELECT c.cluster, c.label, sum(c.tiles)::DOUBLE AS tiles
    FROM cluster_counts AS c
    WHERE c.k = k AND c.label IS NOT NULL
    GROUP BY c.cluster, c.label
),
whole AS (
    SELECT sum(e.tiles) AS tiles, sum(e.tiles * (e.tiles - 1)) AS pairs FROM cells AS e
),
by_cluster AS (
    SELECT e.cluster, sum(e.tiles) AS tiles FROM cells AS e GROUP BY e.cluster
),
by_label AS (
    SELECT e.label, sum(e.tiles) AS tiles FROM cells AS e GROUP BY e.label
),
clusters AS (
    SELECT
        count(*) AS number,
        sum(b.tiles * (b.tiles - 1)) AS pairs,
        abs(sum(b.tiles / w.tiles * ln(b.tiles / w.tiles))) AS entropy
    FROM by_cluster AS b CROSS JOIN whole AS w
),
labels AS (
    SELECT
        count(*) AS number,
        sum(b.tiles * (b.tiles - 1)) AS pairs,
        abs(sum(b.tiles / w.tiles * ln(b.tiles / w.tiles))) AS entropy
    FROM by_label AS b CROSS JOIN whole AS w
),
shared AS (
    SELECT sum(e.tiles / w.tiles * ln(e.tiles * w.tiles / (c.tiles * l.tiles))) AS information
    FROM cells AS e
    JOIN by_cluster AS c ON c.cluster = e.cluster
    JOIN by_label AS l ON l.label = e.label
    CROSS JOIN whole AS w
),
chance AS (
    SELECT c.pairs * l.pairs / nullif(w.tiles * (w.tiles - 1), 0) AS pairs
    FROM clusters AS c CROSS JOIN labels AS l CROSS JOIN whole AS w
)
SELECT
    w.tiles::BIGINT AS labelled_tiles,
    c.number AS clusters,
    l.number AS labels,
    -- Where each tile has its own part, or all have one, both partitions are the same.
    coalesce(
        (w.pairs - n.pairs) / nullif((c.pairs + l.pairs) / 2 - n.pairs, 0), 1
    ) AS adjusted_rand_index,
    coalesce(
        greatest(0, s.information) / nullif((c.entropy + l.entropy) / 2, 0), 1
    ) AS normalised_mutual_information
FROM whole AS w, clusters AS c, labels AS l, shared AS s, chance AS n
WHERE w.tiles > 0;

-- How pure each cluster is in its most frequent label. Purity is the share of the cluster's labelled
-- tiles that carry the label; a cluster without labelled tiles has none.
--
-- purity_low and purity_high are Wilson's interval of 95 % (Wilson, J. Am. Stat. Assoc. 22, 1927),
-- which takes tiles for independent. Tiles of a slide are not: bootstrap_low and bootstrap_high come
-- from drawing slides (see statistics.py), and are NULL where that has not been done for these data.

CREATE OR REPLACE TABLE cluster_purity AS
WITH on_slide AS (
    SELECT
        slide,
        k,
        cluster,
        sum(tiles) AS tiles,
        coalesce(sum(tiles) FILTER (label IS NOT NULL), 0) AS labelled_tiles
    FROM cluster_counts
    GROUP BY slide, k, cluster
),
size AS (  -- three times as fast as counting distinct slides
    SELECT
        k,
        cluster,
        sum(tiles)::BIGINT AS tiles,
        count(*) AS slides,
        sum(labelled_tiles)::BIGINT AS labelled_tiles,
        count(*) FILTER (labelled_tiles > 0) AS labelled_slides
    FROM on_slide
    GROUP BY k, cluster
),
per_label AS (
    SELECT k, cluster, label, sum(tiles) AS tiles
    FROM cluster_counts
    WHERE label IS NOT NULL
    GROUP BY k, cluster, label
),
share AS (
    SELECT *, tiles / sum(tiles) OVER (PARTITION BY k, cluster) AS share
    FROM per_label
),
majority AS (
    SELECT
        k,
        cluster,
        first(label ORDER BY tiles DESC, label) AS label,
        max(share) AS purity,
        abs(sum(share * ln(share) ORDER BY share, label)) AS entropy
    FROM share
    GROUP BY k, cluster
),
wilson AS (
    SELECT
        *,
        1.959963984540054 AS z,
        (purity + z * z / (2 * labelled_tiles)) / (1 + z * z / labelled_tiles) AS centre,
        z / (1 + z * z / labelled_tiles) * sqrt(
            purity * (1 - purity) / labelled_tiles + z * z / (4 * labelled_tiles ** 2)
        ) AS half
    FROM majority JOIN size USING (k, cluster)
),
bootstrap AS (
    SELECT k, cluster, quantile_cont(purity, [0.025, 0.975]) AS interval
    FROM purity_replicates
    WHERE scheme = 'bootstrap'
    GROUP BY k, cluster
)
SELECT
    size.k,
    size.cluster,
    size.tiles,
    size.slides,
    size.labelled_tiles,
    size.labelled_slides,
    wilson.label,
    wilson.purity,
    greatest(0, wilson.centre - wilson.half) AS purity_low,
    least(1, wilson.centre + wilson.half) AS purity_high,
    bootstrap.interval[1] AS bootstrap_low,
    bootstrap.interval[2] AS bootstrap_high,
    wilson.entropy,
    model.version AS model,
    model.encoder,
    model.untrained
FROM size
LEFT JOIN wilson USING (k, cluster)
LEFT JOIN bootstrap USING (k, cluster)
CROSS JOIN model
ORDER BY size.k, size.cluster;

CREATE OR REPLACE MACRO cluster_purity(k) AS TABLE
SELECT p.* FROM cluster_purity AS p WHERE p.k = k ORDER BY p.cluster;

-- Clusters from the purest on, for each label that is some cluster's most frequent one.
CREATE OR REPLACE MACRO purity_curve(k) AS TABLE
SELECT
    p.label,
    row_number() OVER purest AS place,
    p.cluster,
    p.purity,
    p.labelled_tiles,
    p.labelled_tiles / sum(p.labelled_tiles) OVER () AS share,
    sum(p.labelled_tiles) OVER purest / sum(p.labelled_tiles) OVER () AS cumulative_share,
    sum(p.labelled_tiles) OVER purest / sum(p.labelled_tiles) OVER (PARTITION BY p.label)
        AS cumulative_share_of_label
FROM cluster_purity AS p
WHERE p.k = k AND p.labelled_tiles > 0
WINDOW purest AS (
    PARTITION BY p.label
    ORDER BY p.purity DESC, p.labelled_tiles DESC, p.cluster
    ROWS UNBOUNDED PRECEDING
)
ORDER BY p.label, place;

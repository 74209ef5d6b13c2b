-- What share of a slide's tiles lies in each cluster. Clusters a slide has no tiles in have no row;
-- in the wide form, a column a cluster, they have 0. Columns are named with their table: the parameter
-- of a macro stands for an unnamed column k, even in a view that the macro reads.

CREATE VIEW slide_composition AS
SELECT
    c.slide,
    c.k,
    c.cluster,
    sum(c.tiles)::BIGINT AS tiles,
    sum(c.tiles) / sum(sum(c.tiles)) OVER (PARTITION BY c.slide, c.k) AS share,
    (SELECT untrained FROM model) AS untrained
FROM cluster_counts AS c
GROUP BY c.slide, c.k, c.cluster;

CREATE MACRO slide_composition(k) AS TABLE
SELECT p.slide, p.cluster, p.tiles, p.share, p.untrained
FROM slide_composition AS p
WHERE p.k = k
ORDER BY p.slide, p.cluster;

-- for each k
CREATE VIEW slide_composition_k${k} AS
SELECT
    s.slide, s.patient, s.site, s.scanner, s.stain, s.split,
    coalesce(columns(w.* EXCLUDE (slide)), 0)
FROM slides AS s
JOIN (
    PIVOT (SELECT slide, 'cluster_' || cluster AS name, share FROM slide_composition WHERE k = ${k})
    ON name IN (${clusters})
    USING first(share)
    GROUP BY slide
) AS w ON w.slide = s.slide
ORDER BY s.slide;
-- end

-- The cluster of every tile, a row a tile and K, and the labels of tiles. Clusters lie beside their
-- tile, a column a K: a condition on k leaves one branch of the view.

CREATE VIEW clusters AS
SELECT slide, tile, k, cluster, model, false AS current, untrained, label
FROM other_clusters
-- for each k
UNION ALL
SELECT
    slide, tile, ${k}, k${k}::INTEGER,
    (SELECT version FROM model), true, (SELECT untrained FROM model), label
FROM tiles
WHERE k${k} IS NOT NULL
-- end
;

CREATE VIEW labels AS
SELECT slide, tile, label, label_share AS share
FROM tiles
WHERE label IS NOT NULL;

-- On how many slides, sites and scanners a cluster is seen, and what share the largest one has. A
-- cluster that is nearly all of one scanner, while that scanner made a smaller share of all tiles
-- (…_share_of_all), is a batch effect. Tiles of unknown site or scanner do not count for those.

CREATE MACRO cluster_spread(k) AS TABLE
WITH counted AS (
    SELECT c.cluster, c.slide, s.site, s.scanner, sum(c.tiles) AS tiles
    FROM cluster_counts AS c
    LEFT JOIN slides AS s ON s.slide = c.slide
    WHERE c.k = k
    GROUP BY c.cluster, c.slide, s.site, s.scanner
),
by_slide AS (
    SELECT
        d.cluster,
        sum(d.tiles)::BIGINT AS tiles,
        count(*) AS slides,
        first(d.slide ORDER BY d.tiles DESC, d.slide) AS largest,
        max(d.tiles) / sum(d.tiles) AS share
    FROM counted AS d
    GROUP BY d.cluster
),
sites AS (
    SELECT d.cluster, d.site AS name, sum(d.tiles) AS tiles
    FROM counted AS d
    WHERE d.site IS NOT NULL
    GROUP BY d.cluster, d.site
),
all_sites AS (
    SELECT e.name, sum(e.tiles) / sum(sum(e.tiles)) OVER () AS share FROM sites AS e GROUP BY e.name
),
by_site AS (
    SELECT
        e.cluster,
        count(*) AS number,
        first(e.name ORDER BY e.tiles DESC, e.name) AS largest,
        max(e.tiles) / sum(e.tiles) AS share
    FROM sites AS e
    GROUP BY e.cluster
),
scanners AS (
    SELECT d.cluster, d.scanner AS name, sum(d.tiles) AS tiles
    FROM counted AS d
    WHERE d.scanner IS NOT NULL
    GROUP BY d.cluster, d.scanner
),
all_scanners AS (
    SELECT e.name, sum(e.tiles) / sum(sum(e.tiles)) OVER () AS share
    FROM scanners AS e
    GROUP BY e.name
),
by_scanner AS (
    SELECT
        e.cluster,
        count(*) AS number,
        first(e.name ORDER BY e.tiles DESC, e.name) AS largest,
        max(e.tiles) / sum(e.tiles) AS share
    FROM scanners AS e
    GROUP BY e.cluster
)
SELECT
    l.cluster,
    l.tiles,
    l.slides,
    l.largest AS largest_slide,
    l.share AS largest_slide_share,
    coalesce(i.number, 0) AS sites,
    i.largest AS largest_site,
    i.share AS largest_site_share,
    all_sites.share AS site_share_of_all,
    coalesce(c.number, 0) AS scanners,
    c.largest AS largest_scanner,
    c.share AS largest_scanner_share,
    all_scanners.share AS scanner_share_of_all
FROM by_slide AS l
LEFT JOIN by_site AS i ON i.cluster = l.cluster
LEFT JOIN all_sites ON all_sites.name = i.largest
LEFT JOIN by_scanner AS c ON c.cluster = l.cluster
LEFT JOIN all_scanners ON all_scanners.name = c.largest
ORDER BY l.cluster;

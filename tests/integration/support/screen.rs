//! What a terminal shows after all that was printed to it: as much of one as the program needs.

/// The lines of a screen that has had `printed`, from the top, without spaces at their ends.
pub(crate) fn lines(printed: &str, columns: usize, rows: usize) -> Vec<String> {
    let mut cells = vec![vec![' '; columns]; rows];
    let (mut row, mut column) = (0, 0);
    let mut chars = printed.chars();
    while let Some(next) = chars.next() {
        match next {
            '\r' => column = 0,
            '\n' => row += 1,
            '\u{1b}' => {
                // Others than those that begin so are not used.
                assert_eq!(chars.next(), Some('['), "an unknown sequence");
                let mut parameters = String::new();
                let verb = loop {
                    match chars.next() {
                        Some(c) if c.is_ascii_alphabetic() => break c,
                        Some(c) => parameters.push(c),
                        // The rest of it is on its way.
                        None => break ' ',
                    }
                };
                let number = |at: usize| -> usize {
                    parameters.split(';').nth(at).and_then(|n| n.parse().ok()).unwrap_or(1)
                };
                match verb {
                    'H' => (row, column) = (number(0) - 1, number(1) - 1),
                    'J' => cells = vec![vec![' '; columns]; rows],
                    _ => {}
                }
            }
            shown => {
                if let Some(cell) = cells.get_mut(row).and_then(|line| line.get_mut(column)) {
                    *cell = shown;
                }
                column += 1;
            }
        }
    }
    cells.iter().map(|line| line.iter().collect::<String>().trim_end().to_string()).collect()
}

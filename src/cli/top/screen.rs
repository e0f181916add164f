//! The terminal: taken over, and given back however this ends.

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use tokio::sync::mpsc;

use std::time::Duration;

/// How often the keyboard is left to see whether anybody still wants to know of it.
const POLL: Duration = Duration::from_millis(200);

/// The terminal while it is drawn on.
pub(super) struct Screen {
    pub(super) terminal: DefaultTerminal,
}

impl Screen {
    /// Takes it over. A panic gives it back as well.
    ///
    /// # Errors
    /// It is none that can be drawn on.
    pub(super) fn take() -> std::io::Result<Self> {
        match ratatui::try_init() {
            Ok(terminal) => Ok(Self { terminal }),
            Err(error) => {
                // Half of it may be done.
                let _ = ratatui::try_restore();
                Err(error)
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // The cursor first: it is hidden while there is drawing. Where the terminal is gone there is
        // nothing to give back.
        let _ = self.terminal.show_cursor();
        let _ = ratatui::try_restore();
    }
}

/// What somebody at the terminal wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// That it ends; by Ctrl-C or not.
    Quit,
    /// That it is drawn anew: the terminal has another size.
    Redraw,
}

/// Listens to the keyboard, on a thread of its own.
pub(super) fn wishes() -> mpsc::Receiver<Wish> {
    let (tell, wishes) = mpsc::channel(16);
    std::thread::spawn(move || {
        while !tell.is_closed() {
            let wish = match event::poll(POLL) {
                Ok(false) => continue,
                Ok(true) => event::read().map_or(Some(Wish::Quit), |event| wish(&event)),
                // There is no terminal any more.
                Err(_) => Some(Wish::Quit),
            };
            if let Some(wish) = wish
                && tell.blocking_send(wish).is_err()
            {
                return;
            }
        }
    });
    wishes
}

fn wish(event: &Event) -> Option<Wish> {
    match event {
        Event::Resize(..) => Some(Wish::Redraw),
        Event::Key(key) if key.kind == KeyEventKind::Press => match key.code {
            KeyCode::Char('q' | 'Q') | KeyCode::Esc => Some(Wish::Quit),
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Some(Wish::Quit),
            _ => None,
        },
        _ => None,
    }
}
